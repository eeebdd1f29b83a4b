//! `onboarding-agent check` as a command, on hosts that can't start and by users that may not read everything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use onboarding_agent::boot::HeldBoot;
use onboarding_agent::machine::State;
use onboarding_agent::status::{About, Status};
use onboarding_agent::store::Store;
use onboarding_wire::onboarding::IngressListener;
use serde_json::Value;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

/// A directory with everything that `check` looks at.
struct Host(tempfile::TempDir);

impl Host {
    /// `agent` is what the AgentConfiguration has beside its kind. Nothing listens at the endpoint.
    fn new(agent: &str) -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.write(
            "onboarding.yaml",
            "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint: {host: 127.0.0.1, port: 1}\nworkloadGroup: {namespace: bookinfo, name: ratings}\n",
        );
        let agent = agent.replace("DIR", host.0.path().to_str().unwrap());
        host.write(
            "agent.yaml",
            &format!("apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\n{agent}"),
        );
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Something to run, or to be refused.
    fn program(&self, name: &str, mode: u32) {
        self.write(name, "#!/bin/sh\nexit 1\n");
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn store(&self) -> Store {
        Store::open(&self.path("state")).unwrap()
    }

    /// Each finding as `VERDICT what: message`. The endpoint isn't there, so it must fail.
    fn check(&self, more: &[&str]) -> Vec<String> {
        let output = Command::new(env!("CARGO_BIN_EXE_onboarding-agent"))
            .args(["check", "-o", "json", "--envoy-binary", "/no/such/envoy"])
            .args(more)
            .arg("--onboarding-config")
            .arg(self.path("onboarding.yaml"))
            .arg("--agent-config")
            .arg(self.path("agent.yaml"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .env_remove("ONBOARDING_CONFIG")
            .env_remove("AGENT_CONFIG")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        findings
            .iter()
            .map(|it| format!("{} {}: {}", text(&it["verdict"]), text(&it["what"]), text(&it["message"])))
            .collect()
    }
}

/// The one finding that begins so.
#[track_caller]
fn one<'a>(findings: &'a [String], start: &str) -> &'a str {
    let found: Vec<_> = findings.iter().filter(|finding| finding.starts_with(start)).collect();
    assert_eq!(found.len(), 1, "{start}: {findings:#?}");
    found[0]
}

#[test]
fn a_plugin_that_can_not_be_run_is_a_failure() {
    let host = Host::new(
        "host:\n  custom:\n    credential:\n    - plugin: {name: there, path: DIR/there}\n    - plugin: {name: gone, path: DIR/gone}\n    - plugin: {name: barred, path: DIR/barred}\n    - plugin: {name: nowhere-on-path}\n    hostinfo: {plugin: {name: addresses, path: DIR/addresses}}\n",
    );
    host.program("there", 0o755);
    host.program("barred", 0o644);
    let findings = host.check(&[]);
    let directory = host.0.path().display();
    assert_eq!(one(&findings, "OK host: plugin there"), format!("OK host: plugin there is {directory}/there"));
    one(&findings, &format!("FAIL host: plugin gone: {directory}/gone is missing; install it"));
    one(&findings, &format!("FAIL host: plugin barred: {directory}/barred is not executable"));
    one(&findings, "FAIL host: plugin nowhere-on-path: onboarding-agent-nowhere-on-path-plugin (on PATH) is missing");
    one(&findings, &format!("FAIL host: plugin addresses: {directory}/addresses is missing"));
}

const CUSTOM: &str = "host: {custom: {credential: [{plugin: {name: p, path: /bin/sh}}], hostinfo: {plugin: {name: h, path: /bin/sh, args: ['-c', \"printf %s '{\\\"host\\\":{\\\"addresses\\\":[{\\\"ip\\\":\\\"10.0.0.4\\\",\\\"type\\\":\\\"VPC\\\"},{\\\"ip\\\":\\\"52.1.2.3\\\",\\\"type\\\":\\\"INTERNET\\\"}]}}'\"]}}}}\n";

#[test]
fn addresses_are_told_in_the_words_of_the_files() {
    let findings = Host::new(CUSTOM).check(&[]);
    one(&findings, "OK host: addresses to register: 10.0.0.4 (VPC), 52.1.2.3 (INTERNET)");
}

#[test]
fn a_sidecar_of_istio_needs_pilot_agent_and_its_template() {
    let pilot_agent = |host: &Host| host.path("pilot-agent").display().to_string();
    let host = Host::new(&format!("{CUSTOM}sidecar: {{istio: {{revision: canary}}}}\n"));
    let binary = pilot_agent(&host);
    let named = ["--pilot-agent-binary", &binary, "--bootstrap-template", "/no/such/template"];
    let missing = format!("FAIL sidecar: {binary} is missing; install the istio-sidecar package, or name pilot-agent");
    assert!(one(&host.check(&named), &missing).ends_with("(nor is there /usr/local/bin/pilot-agent-canary)"));
    host.program("pilot-agent", 0o755);
    one(&host.check(&named), &format!("FAIL sidecar: {binary} version does not answer as pilot-agent does"));

    // The real one.
    let binaries = std::env::var_os(onboarding_testkit::cluster::BINARIES);
    let binaries = binaries.expect("export ONBOARDING_CLUSTER_BIN=$(dev/kubernetes)");
    let binary = PathBuf::from(binaries).join("pilot-agent").display().to_string();
    let named = ["--pilot-agent-binary", &binary, "--bootstrap-template", "/no/such/template"];
    one(&host.check(&named), "FAIL sidecar: pilot-agent's template /no/such/template is missing");
    host.write("template", "{}");
    let template = host.path("template").display().to_string();
    let named = ["--pilot-agent-binary", &binary, "--bootstrap-template", &template];
    one(&host.check(&named), &format!("OK sidecar: {binary} is pilot-agent "));

    // Envoy alone asks for none of it.
    let host = Host::new(&format!("{CUSTOM}sidecar: {{envoy: {{}}}}\n"));
    let findings = host.check(&["--pilot-agent-binary", "/no/such/pilot-agent"]);
    assert!(!findings.iter().any(|finding| finding.contains("pilot-agent")), "{findings:#?}");
}

#[test]
fn before_the_first_join_what_listens_on_every_address_is_named() {
    let host = Host::new(CUSTOM);
    let open = TcpListener::bind("0.0.0.0:0").unwrap();
    let own = TcpListener::bind("127.0.0.1:0").unwrap();
    let findings = host.check(&[]);
    let application =
        one(&findings, "WARN application: the sidecar's ports aren't known before the agent has joined; ");
    assert!(application.contains(&format!("{}", open.local_addr().unwrap())), "{application}");
    assert!(!application.contains(&own.local_addr().unwrap().to_string()), "{application}");
    assert!(!application.contains(&format!("0.0.0.0:{}", own.local_addr().unwrap().port())), "{application}");
}

#[test]
fn the_status_has_the_ports_for_whom_may_not_read_the_boot_configuration() {
    let host = Host::new(CUSTOM);
    let open = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = u32::from(open.local_addr().unwrap().port());
    let ingress = vec![
        IngressListener { bind: String::new(), port, default_endpoint: "127.0.0.1:9080".to_owned() },
        IngressListener { bind: String::new(), port: 80, default_endpoint: "127.0.0.1:8080".to_owned() },
    ];
    let boot = HeldBoot { version: "1".to_owned(), ingress, ..HeldBoot::default() };
    let store = host.store();
    let state = State::new("2026-11-24T11:00:00Z".parse().unwrap(), None, None, None);
    let told = |held| Status::of(&state, held, &About::default()).write(&store).unwrap();

    told(None);
    one(&host.check(&[]), "WARN application: the sidecar's ports aren't known");
    told(Some(&boot));
    let by_status = host.check(&[]);
    let application =
        format!("FAIL application: something listens on 0.0.0.0:{port}, which is every address of this host");
    assert!(one(&by_status, &application).ends_with("Let it listen on 127.0.0.1:9080 only"));
    assert!(by_status.iter().any(|finding| finding.contains(" ports: 80: below 1024")), "{by_status:#?}");

    // Who may read the boot configuration is told the same.
    std::fs::remove_file(store.status_path()).unwrap();
    store.keep_boot(&boot).unwrap();
    assert_eq!(host.check(&[]), by_status);
}
