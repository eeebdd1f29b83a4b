use super::*;

fn ingress(port: u32, default_endpoint: &str) -> [Ingress; 1] {
    [Ingress { bind: String::new(), port, default_endpoint: default_endpoint.to_owned() }]
}

fn addresses(list: &[&str]) -> Vec<SocketAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

fn verdicts(findings: &[Finding]) -> Vec<Verdict> {
    findings.iter().map(|finding| finding.verdict).collect()
}

#[test]
fn an_application_on_every_address_is_found() {
    for all in ["0.0.0.0:8080", "[::]:8080"] {
        let findings = application(&ingress(8080, "127.0.0.1:8080"), &addresses(&[all]), &[]);
        assert_eq!(verdicts(&findings), [Verdict::Fail]);
        assert!(findings[0].message.contains("Let it listen on 127.0.0.1:8080 only"), "{}", findings[0]);
    }
    // Another port is nobody's business.
    let listening = addresses(&["0.0.0.0:22", "127.0.0.1:8080", "10.0.0.4:8080"]);
    let own = ["10.0.0.4".parse().unwrap()];
    assert_eq!(verdicts(&application(&ingress(8080, "127.0.0.1:8080"), &listening, &own)), [Verdict::Ok]);
}

#[test]
fn an_application_on_every_address_of_a_port_of_its_own_is_reached_around_the_sidecar() {
    for all in ["0.0.0.0:9080", "[::]:9080"] {
        let findings = application(&ingress(8080, "127.0.0.1:9080"), &addresses(&["10.0.0.4:8080", all]), &[]);
        assert_eq!(verdicts(&findings), [Verdict::Warn], "{findings:?}");
        for words in [all, "reached around the sidecar's port 8080", "Let it listen on 127.0.0.1:9080 only"] {
            assert!(findings[0].message.contains(words), "{}", findings[0]);
        }
    }
    let findings = application(&ingress(8080, "127.0.0.1:9080"), &addresses(&["0.0.0.0:22", "127.0.0.1:9080"]), &[]);
    assert_eq!(verdicts(&findings), [Verdict::Ok], "{findings:?}");
    // Where the Sidecar asks for it the application can do nothing.
    for listening in ["0.0.0.0:9080", "10.0.0.4:9080"] {
        let findings = application(&ingress(8080, "0.0.0.0:9080"), &addresses(&[listening]), &[]);
        assert_eq!(verdicts(&findings), [Verdict::Warn]);
        assert!(findings[0].message.contains("defaultEndpoint 0.0.0.0:9080"), "{}", findings[0]);
    }
}

#[test]
fn an_application_that_is_not_there_or_beside_the_sidecar_is_a_warning() {
    let findings = application(&ingress(8080, "127.0.0.1:8080"), &[], &[]);
    assert_eq!(verdicts(&findings), [Verdict::Warn]);
    assert!(findings[0].message.contains("nothing listens on 127.0.0.1:8080"));
    let own = ["10.0.0.4".parse().unwrap()];
    let findings = application(&ingress(8080, "10.0.0.4:9090"), &addresses(&["10.0.0.4:9090"]), &own);
    assert_eq!(verdicts(&findings), [Verdict::Warn]);
    assert!(findings[0].message.contains("around the sidecar"));
}

#[test]
fn the_kernels_tables_are_read() {
    let tcp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n\
        1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n\
        2: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n\
        garbage\n";
    assert_eq!(parse_listening(tcp), addresses(&["127.0.0.1:8080", "0.0.0.0:22"]));
    let tcp6 = "header\n\
        0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A x\n\
        1: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A x\n\
        2: 0000000000000000FFFF00000100007F:1F92 00000000000000000000000000000000:0000 0A x\n";
    assert_eq!(parse_listening(tcp6), addresses(&["[::]:8080", "[::1]:8081", "127.0.0.1:8082"]));
    for table in
        ["", "h\n0: zz:1F90 x 0A\n", "h\n0: 0100007F x 0A\n", "h\n0: \u{e9}100007:1F90 x 0A\n", "h\n0: 01:99999 x 0A"]
    {
        assert!(parse_listening(table).is_empty(), "{table}");
    }
}

#[test]
fn this_processes_own_listener_is_found() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    assert!(parse_listening(&table).contains(&listener.local_addr().unwrap()));
}

#[test]
fn low_ports_want_the_capability() {
    let ingress = |port| ingress(port, "");
    let rights = |capable| LowPortRights { first_unprivileged: 1024, capable };
    assert!(low_ports(&ingress(8080), rights(false)).is_none());
    let finding = low_ports(&ingress(80), rights(false)).unwrap();
    assert_eq!(finding.verdict, Verdict::Fail);
    assert!(finding.message.contains("AmbientCapabilities=CAP_NET_BIND_SERVICE"));
    assert_eq!(low_ports(&ingress(80), rights(true)).unwrap().verdict, Verdict::Ok);
    assert!(effective_net_bind("Name:\tx\nCapEff:\t0000000000000400\n"));
    assert!(!effective_net_bind("CapEff:\t00000000000003ff\n") && !effective_net_bind(""));
}

#[test]
fn a_skewed_clock_fails_with_its_direction() {
    let ahead = |seconds| clock(SignedDuration::from_secs(seconds));
    assert_eq!(ahead(60).verdict, Verdict::Ok);
    assert!(ahead(61).message.contains("61 s ahead of"));
    let behind = ahead(-3600);
    assert_eq!(behind.verdict, Verdict::Fail);
    assert!(behind.message.contains("3600 s behind"));
}

#[test]
fn a_finding_is_one_line_for_each_fault() {
    let text = finding("configuration", Verdict::Fail, "a: x\nb: y").to_string();
    assert_eq!(text, "FAIL  configuration: a: x\nFAIL  configuration: b: y");
}
