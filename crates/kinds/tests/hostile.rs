//! Input that nobody meant: whatever it is, reading ends, and says what is wrong in lines that a terminal can be shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_kinds::fault::Fault;
use onboarding_kinds::manifest::{self, Manifests, Object};
use onboarding_kinds::{agent, identity};
use proptest::prelude::*;

const POLICY: &str = include_str!("requirement/policy-narrow.yaml");
const GROUP: &str = include_str!("requirement/workloadgroup.yaml");

fn lines(manifests: &Manifests) -> Vec<String> {
    manifests.faults.iter().map(ToString::to_string).collect()
}

fn read_all(text: &str) -> Vec<Fault> {
    let mut manifests = manifest::read("f.yaml", text);
    manifests.faults.extend(manifest::cross_check(&manifests.items));
    manifests.faults.append(&mut manifests.warnings);
    manifests.faults.extend(agent::read_onboarding_configuration("f", text).err().unwrap_or_default());
    manifests.faults.extend(agent::read_agent_configuration("f", text).err().unwrap_or_default());
    manifests.faults.extend(identity::read_identity_file("f", text).err().unwrap_or_default());
    manifests.faults
}

#[test]
fn a_syntax_error_hides_nothing_before_or_after_it() {
    let wrong = POLICY.replace("'123456789012'", "123456789012");
    let text = format!("{wrong}---\nkind: [\n---\n{GROUP}---\n{wrong}");
    let manifests = manifest::read("f.yaml", &text);
    let found = lines(&manifests);
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(found[0].starts_with("f.yaml:13: OnboardingPolicy bookinfo/allow-narrow-"), "{}", found[0]);
    assert!(found[1].starts_with("f.yaml:27: this is not YAML: "), "{}", found[1]);
    assert!(found[2].starts_with("f.yaml:56: OnboardingPolicy bookinfo/allow-narrow-"), "{}", found[2]);
    assert!(manifests.policy_unreadable);
    assert!(matches!(manifests.items.as_slice(), [item] if item.line == 29));
}

#[test]
fn a_syntax_error_anywhere_may_hide_a_policy() {
    for text in ["kind: ControlPlane\nspec: [", "\"", "a: b: c", "kind: Deployment\n\tx: 1", "%YAML 1.2\n", "*a", "}"] {
        let manifests = manifest::read("f.yaml", text);
        assert!(manifests.policy_unreadable && !manifests.faults.is_empty(), "{text:?}");
    }
}

#[test]
fn a_file_cut_off_anywhere_is_read_to_its_end_or_said_to_be_unreadable() {
    for end in (0..POLICY.len()).filter(|end| POLICY.is_char_boundary(*end)) {
        let manifests = manifest::read("f.yaml", &POLICY[..end]);
        match manifests.items.as_slice() {
            [] => assert!(manifests.policy_unreadable || POLICY[..end].trim().is_empty(), "cut at {end}"),
            // Only what can't be told from a whole file passes: a selector that goes on in the next line (null is absent),
            // and a shorter label. Whoever reads files takes care that they are whole.
            _ => assert!(end > POLICY.find("matchLabels:").unwrap(), "cut at {end}"),
        }
    }
}

#[test]
fn documents_that_are_no_manifests() {
    for (text, wanted) in [
        ("just text", "f.yaml:1: must be a mapping, and is text"),
        ("- a\n- b", "f.yaml:1: must be a mapping, and is a list"),
        ("{}", "f.yaml:1: apiVersion: is required\nf.yaml:1: kind: is required"),
        ("kind: 5\napiVersion: v1", "f.yaml:1: kind: must be text, and 5 without quotes is a number; quote it: '5'"),
        ("kind: OnboardingPolicy", "f.yaml:1: OnboardingPolicy: apiVersion: is required"),
    ] {
        let manifests = manifest::read("f.yaml", text);
        assert_eq!(lines(&manifests).join("\n"), wanted);
        assert!(manifests.policy_unreadable, "{text}");
    }
    for text in ["", "\n\n", "# only a comment", "---\n---\n...\n", "~", "\u{feff}"] {
        let manifests = manifest::read("f.yaml", text);
        assert!(manifests.faults.is_empty() && manifests.items.is_empty() && !manifests.policy_unreadable, "{text:?}");
    }
}

#[test]
fn kinds_of_others_are_skipped_whatever_is_in_them() {
    for (api_version, kind) in [
        ("apps/v1", "Deployment"),
        ("install.tetrate.io/v1alpha1", "ManagementPlane"),
        ("networking.istio.io/v1", "VirtualService"),
        ("controlplane.cluster.x-k8s.io/v1beta1", "ControlPlane"),
        ("v1", "ConfigMap"),
        ("serving.knative.dev/v1", "Service"),
    ] {
        let text = format!("apiVersion: {api_version}\nkind: {kind}\nspec: {{a: 1, a: 2, meshExpansion: []}}\n");
        let manifests = manifest::read("f.yaml", &text);
        assert_eq!(lines(&manifests), Vec::<String>::new(), "{kind}");
        assert!(manifests.items.is_empty() && !manifests.policy_unreadable);
    }
}

#[test]
fn what_kubectl_prints_and_json_are_read_too() {
    let policy = manifest::read("f.yaml", POLICY);
    let Object::OnboardingPolicy(policy) = &policy.items[0].object else { panic!("not a policy") };
    let indented = POLICY.trim_end().replace('\n', "\n  ");
    let list = format!("apiVersion: v1\nkind: List\nitems:\n- {indented}\n");
    let json = r#"{"apiVersion": "authorization.onboarding.tetrate.io/v1alpha1", "kind": "OnboardingPolicy",
        "metadata": {"name": "allow-narrow-subset-of-aws-ec2-instances", "namespace": "bookinfo", "uid": "x", "managedFields": []},
        "spec": {"allow": [{"workloads": [{"aws": {"partitions": ["aws"], "accounts": ["123456789012"], "regions": ["us-east-2"],
          "zones": ["us-east-2b"], "ec2": {"iamRoleNames": ["ratings-role"]}, "ecs": null}}],
          "onboardTo": [{"workloadGroupSelector": {"matchLabels": {"app": "ratings"}}}]}]}, "status": {}}"#;
    let anchors = POLICY.replace("metadata:", "metadata: &m").replace("app: ratings", "app: !!str ratings");
    for text in [
        list.as_str(),
        json,
        &anchors,
        &POLICY.replace('\n', "\r\n"),
        &format!("\u{feff}{POLICY}"),
        &format!("%YAML 1.2\n---\n{POLICY}...\n"),
    ] {
        let manifests = manifest::read("f.yaml", text);
        assert_eq!(lines(&manifests), Vec::<String>::new(), "{text}");
        let [item] = manifests.items.as_slice() else { panic!("{text}") };
        assert!(matches!(&item.object, Object::OnboardingPolicy(read) if read == policy), "{text}");
    }
}

#[test]
fn a_policy_without_a_namespace_is_in_default() {
    let manifests = manifest::read("f.yaml", &POLICY.replace("  namespace: bookinfo\n", ""));
    assert!(matches!(&manifests.items[0].object, Object::OnboardingPolicy(policy) if policy.namespace == "default"));
}

#[test]
fn null_is_absent_and_an_empty_mapping_is_present() {
    let policy = |ecs: &str| {
        manifest::read("f.yaml", &POLICY.replace("        ec2:", &format!("        ecs: {ecs}\n        ec2:")))
    };
    for null in ["", "~", "null"] {
        assert!(policy(null).faults.is_empty());
    }
    assert_eq!(policy("{}").faults.len(), 1);
}

#[test]
fn what_is_unwise_is_a_warning() {
    let gcp = POLICY
        .replace("    onboardTo:", "    - gcp: {projectIds: [x]}\n    - azure: {subscriptions: [x]}\n    onboardTo:");
    let manifests = manifest::read("f.yaml", &gcp);
    assert!(manifests.faults.is_empty() && manifests.items.len() == 1);
    let null = POLICY.replace("          app: ratings # (1)\n", "");
    let warnings = manifest::read("f.yaml", &null).warnings;
    assert_eq!(warnings.iter().map(|warning| warning.line).collect::<Vec<_>>(), [23]);

    let warnings: Vec<_> = manifests.warnings.iter().map(|w| (w.line, w.path.as_str())).collect();
    assert_eq!(warnings, [(22, "spec.allow[0].workloads[1].gcp"), (23, "spec.allow[0].workloads[2].azure")]);

    // Of a task nothing proves where it runs.
    for (of_task, asks_for) in [
        ("regions: [a], ecs: {}", Some("regions")),
        ("zones: [a], ecs: {clusters: [b], iamRoleNames: [c]}", Some("zones and ecs.clusters")),
        ("partitions: [aws], ecs: {iamRoleNames: [c]}", None),
        ("regions: [a], zones: [b], ec2: {}", None),
    ] {
        let added = format!("    - aws: {{accounts: ['123456789012'], {of_task}}}\n    onboardTo:");
        let warnings = manifest::read("f.yaml", &POLICY.replace("    onboardTo:", &added)).warnings;
        let found: Vec<_> = warnings.iter().map(|w| (w.line, w.path.as_str(), w.message.as_str())).collect();
        let message = asks_for.map(|asks_for| format!(
            "matches nothing: of an ECS task only partition, account and IAM role are proven, and this asks for {asks_for} too"
        ));
        let wanted: Vec<_> =
            message.iter().map(|message| (22, "spec.allow[0].workloads[1].aws.ecs", message.as_str())).collect();
        assert_eq!(found, wanted, "{of_task}");
    }

    let onboarding = include_str!("corpus/onboarding-configuration.yaml");
    let insecure = onboarding.replace("insecureSkipVerify: false", "insecureSkipVerify: true");
    let plain = onboarding
        .replace("    tls:\n      sni: onboarding-endpoint.example\n      insecureSkipVerify: false", "    none: {}");
    for (text, warnings) in [(onboarding, 0), (insecure.as_str(), 1), (plain.as_str(), 1)] {
        let manifests = manifest::read("f.yaml", text);
        assert_eq!((manifests.faults.len(), manifests.warnings.len()), (0, warnings), "{text}");
    }

    let plane = include_str!("corpus/control-plane.yaml");
    for (delay, warns) in [("14999ms", false), ("15s", true), ("1h", true), ("0s", false), ("0", false)] {
        let manifests =
            manifest::read("f.yaml", &plane.replace("propagationDelay: 10s", &format!("propagationDelay: {delay}")));
        assert!(manifests.faults.is_empty(), "{:?}", manifests.faults);
        assert_eq!(!manifests.warnings.is_empty(), warns, "{delay}");
    }
    for (life, warns) in [("1h", false), ("720h", false), ("721h", true)] {
        let manifests = manifest::read("f.yaml", &plane.replace("expiration: 1h30m", &format!("expiration: {life}")));
        assert!(manifests.faults.is_empty(), "{:?}", manifests.faults);
        assert_eq!(!manifests.warnings.is_empty(), warns, "{life}");
    }
    let nameless = plane.replace(r#"{"kid":"1","kty""#, r#"{"kty":"EC","crv":"P-256","kid":"1"},{"kid":2,"kty""#);
    let warnings = manifest::read("f.yaml", &nameless).warnings;
    let found: Vec<_> =
        warnings.iter().map(|w| (w.line, w.path.rsplit('.').next().unwrap(), &w.message[..18])).collect();
    assert_eq!(found, [(38, "jwks", "keys[1] has no kid")]);
    let manifests = manifest::read("f.yaml", &plane.replace("    onboarding:\n", "    onbording:\n"));
    assert!(manifests.faults.is_empty());
    assert_eq!(manifests.warnings[0].message, "isn't known here; did you mean onboarding?");
}

#[test]
fn what_is_wrong_between_objects() {
    let plane = include_str!("corpus/control-plane.yaml");
    let text = format!(
        "{POLICY}---\n{GROUP}---\n{POLICY}---\n{plane}---\n{}",
        plane.replace("name: controlplane", "name: other")
    );
    let manifests = manifest::read("f.yaml", &text);
    assert_eq!(lines(&manifests), Vec::<String>::new());
    let found: Vec<_> = manifest::cross_check(&manifests.items).iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        [
            "f.yaml:42: OnboardingPolicy bookinfo/allow-narrow-subset-of-aws-ec2-instances: metadata.name: is there twice, first at f.yaml:1",
            "f.yaml:109: ControlPlane istio-system/other: spec.meshExpansion.onboarding: another ControlPlane enables onboarding, at f.yaml:68; one may",
        ]
    );
    // A ControlPlane that doesn't enable onboarding is in nobody's way, and a name is one's own per namespace and kind.
    let text = format!(
        "{plane}---\napiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {{name: other}}\n---\n{POLICY}---\n{}",
        POLICY.replace("bookinfo", "other")
    );
    assert_eq!(manifest::cross_check(&manifest::read("f.yaml", &text).items), []);
}

#[test]
fn the_wrong_file_of_an_agent_is_named() {
    let onboarding = include_str!("corpus/onboarding-configuration.yaml");
    let configuration = include_str!("corpus/agent-configuration.yaml");
    let fault = agent::read_onboarding_configuration("f", configuration).unwrap_err();
    assert_eq!(
        fault[0].to_string(),
        "f:2: OnboardingConfiguration: kind: must be OnboardingConfiguration in this file, and is \"AgentConfiguration\"; an AgentConfiguration belongs into /etc/onboarding-agent/agent.config.yaml"
    );
    let fault = agent::read_agent_configuration("f", onboarding).unwrap_err();
    assert!(
        fault[0]
            .message
            .ends_with("an OnboardingConfiguration belongs into /etc/onboarding-agent/onboarding.config.yaml")
    );
    let fault = agent::read_onboarding_configuration("f", POLICY).unwrap_err();
    assert_eq!((fault.len(), fault[0].path.as_str()), (1, "kind"));
    let fault = agent::read_onboarding_configuration("f", "").unwrap_err();
    assert_eq!(
        fault[0].to_string(),
        "f:1: OnboardingConfiguration: the file is empty, and must hold one OnboardingConfiguration"
    );
    let fault = agent::read_agent_configuration("f", &format!("{configuration}---\n{configuration}")).unwrap_err();
    assert_eq!((fault.len(), fault[0].line), (1, 31));
    // As environment variables have it in a container.
    let json = r#"{"apiVersion":"config.agent.onboarding.tetrate.io/v1alpha1","kind":"AgentConfiguration"}"#;
    assert_eq!(agent::read_agent_configuration("f", json), Ok(agent::AgentConfiguration::default()));
}

#[test]
fn bombs_are_refused_quickly() {
    let mut aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let last = format!("*a{}", level - 1);
        aliases += &format!("a{level}: &a{level} [{}]\n", [last.as_str(); 10].join(", "));
    }
    let nested_aliases: String = (1..50)
        .fold("a0: &a0 [x]\n".to_owned(), |text, level| text + &format!("a{level}: &a{level} [[*a{}]]\n", level - 1));
    let deep_flow = "[".repeat(100_000);
    let deep_block: String = (0..500).map(|level| format!("{}a:\n", " ".repeat(level))).collect();
    let deep_dashes = "- ".repeat(50_000);
    let many_anchors: String = (0..40_000).map(|n| format!("- &a{n} x\n")).collect();
    for (name, text) in [
        ("aliases", aliases),
        ("an alias in itself", "a: &a [*a]".to_owned()),
        ("nested aliases", nested_aliases),
        ("deep flow", deep_flow),
        ("deep block", deep_block),
        ("deep dashes", deep_dashes),
        ("a large document", "x".repeat(1024 * 1024 + 1)),
        ("a large file", "# x\n".repeat(4 * 1024 * 1024 + 1)),
        ("one key often", "a: b\n".repeat(200_000)),
        ("many unknown keys", (0..60_000).fold(POLICY.to_owned(), |text, n| text + &format!("speck{n}: x\n"))),
        ("many documents", "a: b\n---\n".repeat(1_000_000)),
        ("many issuers", many_issuers()),
    ] {
        let started = std::time::Instant::now();
        let manifests = manifest::read("f.yaml", &text);
        assert!(manifests.policy_unreadable, "{name}");
        assert!(manifests.faults.iter().all(|fault| fault.message.len() < 1000), "{name}");
        assert!(manifests.faults.len() <= 1001, "{name}");
        // Debug builds on a busy machine; what these would take unbounded is hours.
        assert!(started.elapsed().as_secs() < 20, "{name} took {:?}", started.elapsed());
    }
    read_all(&many_anchors);
    read_all(&"a: 1\n---\n".repeat(50_000));
    read_all(&format!("kind: &a {}\nb: *a", "x".repeat(500_000)));
}

fn many_issuers() -> String {
    let plane = include_str!("corpus/control-plane.yaml");
    let issuer = "            - {issuer: https://a, shortName: a}\n";
    let plane = plane.replace("            issuers:\n", &format!("            issuers:\n{}", issuer.repeat(20_000)));
    format!("{plane}---\n[")
}

#[test]
fn secrets_are_not_in_messages() {
    let mesh = include_str!("corpus/mesh.yaml");
    let key = "c3VwZXJzZWNyZXQ";
    for wrong in [
        mesh.replace("    AAAA", &format!("    {key}!")),
        mesh.replace("  tls.key: |", &format!("  tls.key: [{key}]\n  other: |")),
        mesh.replace("-----BEGIN PRIVATE", &format!("{key}-----BEGIN")),
    ] {
        let manifests = manifest::read("f.yaml", &wrong);
        assert!(!manifests.faults.is_empty());
        assert!(!format!("{:?}", manifests.faults).contains(key));
    }
    assert!(!format!("{:?}", manifest::read("f.yaml", mesh).items).contains("AAAA"));
}

#[test]
fn a_fault_is_one_line_that_a_terminal_can_be_shown() {
    let fault = Fault {
        file: "a\nb".to_owned(),
        line: 1,
        object: "K \u{1b}[31mx/\u{202e}y".to_owned(),
        path: "a\u{0}".to_owned(),
        message: "\r\u{85}\u{2028}ü".to_owned(),
    };
    assert_eq!(fault.to_string(), r"a\nb:1: K \u{1b}[31mx/\u{202e}y: a\u{0}: \r\u{85}\u{2028}ü");
}

fn is_one_clean_line(fault: &Fault) -> bool {
    !fault.to_string().chars().any(|c| c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c))
}

/// Pieces that manifests are made of, so that what is generated gets past the first line.
fn yaml_ish() -> impl Strategy<Value = String> {
    let pieces: Vec<&'static str> = "apiVersion: |kind: |OnboardingPolicy|ControlPlane|WorkloadGroup|Sidecar|Secret|AgentConfiguration|\
        OnboardingConfiguration|authorization.onboarding.tetrate.io/v1alpha1|install.tetrate.io/v1alpha1|networking.istio.io/v1|v1|List|items:|\
        config.agent.onboarding.tetrate.io/v1alpha1|metadata:|spec:|name: x|allow:|workloads:|aws:|accounts: |'123456789012'|ec2: {}|onboardTo:|\
        meshExpansion:|onboarding:|endpoint:|hosts:|jsonPath: |$['a']|.a|jwks: |{\"keys\":[]}|type: kubernetes.io/tls|data:|tls.crt: |\
        template:|probe:|httpGet:|port: |host:|custom:|credential:|plugin:|1h|&a |*a|<<: |!!str |!x |? |: |- |[|]|{|}|,|'|\"|\\|%|#|~|0x1f|.inf|1e9|\
        \u{1b}[0m|\u{0}|\u{85}|\u{2028}|ü|---|...|>-|\t"
        .split('|')
        .chain(["|", "\n", "\n  ", "\n    ", "\n- ", "\n  - ", "\n---\n", " "])
        .collect();
    proptest::collection::vec(proptest::sample::select(pieces), 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_read_without_panic(text in any::<String>()) {
        prop_assert!(read_all(&text).iter().all(is_one_clean_line));
    }

    #[test]
    fn anything_like_yaml_is_read_without_panic(text in yaml_ish()) {
        prop_assert!(read_all(&text).iter().all(is_one_clean_line));
    }

    #[test]
    fn a_changed_policy_is_read_without_panic(at in 0..POLICY.len(), length in 0..20_usize, new in yaml_ish()) {
        let mut text = POLICY.as_bytes().to_vec();
        text.splice(at..(at + length).min(text.len()), new.bytes());
        let text = String::from_utf8_lossy(&text);
        let manifests = manifest::read("f.yaml", &text);
        prop_assert!(manifests.faults.iter().all(is_one_clean_line));
        let lines = text.lines().count() + 1;
        prop_assert!(manifests.faults.iter().all(|fault| (1..=lines).contains(&fault.line)), "{:?}", manifests.faults);
    }
}
