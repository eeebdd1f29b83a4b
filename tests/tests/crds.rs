//! A real API server and lint, asked about the same documents: what lint refuses, `kubectl apply` refuses, in words as good.
//!
//! The documents are the corpus of `crates/kinds` (its `mod.rs` says how it is written); where an answer is another, the test prints the
//! lines that it would be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "../../crates/kinds/tests/corpus/mod.rs"]
mod corpus;

use corpus::{Block, blocks, cases, corpus};
use libtest_mimic::{Arguments, Trial};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::process::Ended;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

const CORPUS: &str = "../crates/kinds/tests/corpus";
const KINDS: [&str; 3] = ["policy", "control-plane", "war"];
/// How many kubectls run at a time.
const AT_ONCE: usize = 4;

type Test = (&'static str, fn(&Cluster));

const TESTS: &[Test] = &[
    ("kubectl_apply_refuses_what_lint_refuses", corpus_is_refused),
    ("an_api_server_takes_and_refuses_the_values_that_lint_does", values_are_judged_alike),
    ("kubectl_get_prints_these_columns", columns),
    ("what_is_others_is_kept", others_is_kept),
    ("a_status_is_written_apart_by_several_managers", statuses),
    ("the_largest_policy_is_within_the_budget", largest_policy),
    ("lint_warns_of_what_is_too_large_for_a_cluster", too_large),
];

fn main() -> ExitCode {
    let cluster = Arc::new(LazyLock::new(cluster as fn() -> Cluster));
    let trials = TESTS.iter().map(|(name, test)| {
        let cluster = cluster.clone();
        Trial::test(*name, move || {
            test(&cluster);
            Ok(())
        })
    });
    let trials = trials.collect();
    drop(cluster);
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A cluster with our CRDs, and the namespaces that the corpus is in.
fn cluster() -> Cluster {
    let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
    cluster.apply_crds(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds"))).unwrap();
    for namespace in ["bookinfo", "istio-system"] {
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
    }
    cluster
}

fn apply(cluster: &Cluster, document: &str) -> Ended {
    loop {
        let ended = run("apply", cluster, document);
        // Another test made this object between kubectl's look and its request.
        if !ended.stderr.contains("(AlreadyExists)") {
            return ended;
        }
    }
}

fn run(verb: &str, cluster: &Cluster, document: &str) -> Ended {
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let file = cluster.directory().join(format!("{}.yaml", FILES.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&file, document).unwrap();
    let file = file.to_str().unwrap();
    let mut ended = cluster.try_kubectl([verb, "--dry-run=server", "-f", file]).unwrap();
    ended.stderr = ended.stderr.replace(file, "FILE");
    ended
}

/// What of kubectl's words is about the document: one line a fault.
fn answers(ended: &Ended) -> Vec<String> {
    if ended.status.success() {
        return Vec::new();
    }
    let text = ended.stderr.trim();
    let (heading, body) = match text.split_once("is invalid: ") {
        Some((_, body)) => ("", body),
        None => match text.split_once("strict decoding error: ") {
            Some((_, body)) => ("", body),
            None => (text, ""),
        },
    };
    let lines = heading.lines().chain(body.lines()).map(|line| line.trim().trim_start_matches("* ").to_owned());
    let parts = lines.flat_map(|line| match line.starts_with("unknown field") {
        true => line.split(", ").map(str::to_owned).collect(),
        false => vec![line],
    });
    // It follows from the other lines.
    parts.filter(|line| !line.is_empty() && !line.contains("some validation rules were not checked")).collect()
}

/// Asks about every document of the corpus; gives what is answered, in order.
fn ask(cluster: &Cluster, documents: &[String]) -> Vec<Vec<String>> {
    let (next, answered) = (AtomicUsize::new(0), Mutex::new(vec![Vec::new(); documents.len()]));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((index, document)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    documents.get(index).map(|document| (index, document))
                } {
                    let found = answers(&apply(cluster, document));
                    answered.lock().unwrap()[index] = found;
                }
            });
        }
    });
    answered.into_inner().unwrap()
}

/// A path as lint writes it.
fn as_lint_writes(path: &str) -> String {
    let key = |key: &str| match key.parse::<usize>() {
        Ok(_) => format!("[{key}]"),
        Err(_) => format!(".{key}"),
    };
    let mut parts = path.split('[');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.filter_map(|part| part.split_once(']')).fold(first, |path, (inner, rest)| path + &key(inner) + rest)
}

fn corpus_is_refused(cluster: &Cluster) {
    let mut wrong = String::new();
    for kind in KINDS {
        let good = corpus(&format!("{kind}.yaml"));
        assert_eq!(answers(&apply(cluster, &good)), Vec::<String>::new(), "{kind}.yaml is good");
        let blocks = blocks(&corpus(&format!("{kind}.refusals")));
        let documents: Vec<_> = blocks.iter().map(|block| good.replacen(&block.from, &block.to, 1)).collect();
        for (Block { rule, faults, answers, .. }, mut found) in blocks.iter().zip(ask(cluster, &documents)) {
            let mut wanted: Vec<_> =
                answers.iter().filter(|answer| !answer.starts_with("accepts: ")).cloned().collect();
            // The API server goes through the fields of an object in no order.
            found.sort();
            wanted.sort();
            if found != wanted || answers.is_empty() {
                wrong += &format!("\n{kind}: {rule}\n@ {}\n", found.join("\n@ "));
            }
            // Each answer is about a field that lint has a fault of, or about what that is in.
            for path in
                found.iter().filter(|answer| answer.starts_with("spec.")).filter_map(|answer| answer.split(": ").next())
            {
                let path = as_lint_writes(path);
                if !faults.iter().any(|fault| fault.contains(&format!(": {path}"))) {
                    wrong += &format!("\n{kind}: {rule}: lint has nothing at {path}\n");
                }
            }
        }
    }
    assert!(wrong.is_empty(), "what was answered:\n{wrong}");
}

fn values_are_judged_alike(cluster: &Cluster) {
    let cases = cases();
    let documents: Vec<_> = cases.iter().map(|case| case.document.clone()).collect();
    let answered = cases.iter().zip(ask(cluster, &documents));
    let wrong = answered.filter(|(case, answers)| answers.is_empty() != case.good);
    let wrong: Vec<_> =
        wrong.map(|(case, answers)| format!("{}: {:?}: {}", case.rule, case.value, answers.join("; "))).collect();
    assert!(wrong.is_empty(), "judged otherwise:\n{}", wrong.join("\n"));
}

fn heading(cluster: &Cluster, what: &str) -> Vec<String> {
    let table = cluster.kubectl(["get", what, "-n", "bookinfo"]).unwrap();
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

fn columns(cluster: &Cluster) {
    cluster.apply(&corpus("war.yaml").replace("uid: x", "uid: '1'")).unwrap();
    cluster.apply(&corpus("policy.yaml")).unwrap();
    let name = "ratings-aws-aws-123456789012-ca-central-1b-ec2-i-1234567890abcdef0";
    patch_status(cluster, "war", name, r#"{"conditions": [{"type": "AgentConnected", "status": "True"}]}"#);
    let accepted = r#"{"workloads": 3, "conditions": [{"type": "Accepted", "status": "True"}]}"#;
    patch_status(cluster, "op", "everything", accepted);
    let war = heading(cluster, "war");
    assert_eq!(war[0], "NAME AGENT CONNECTED AGE");
    assert!(war[1].starts_with(&format!("{name} True ")), "{war:?}");
    let policy = heading(cluster, "op");
    assert_eq!(policy[0], "NAME ACCEPTED WORKLOADS AGE");
    assert!(policy[1].starts_with("everything True 3 "), "{policy:?}");
}

fn patch_status(cluster: &Cluster, kind: &str, name: &str, status: &str) {
    let patch = format!(r#"{{"status": {status}}}"#);
    let arguments = ["patch", kind, name, "-n", "bookinfo", "--subresource=status", "--type=merge", "-p", &patch];
    cluster.kubectl(arguments).unwrap();
}

fn others_is_kept(cluster: &Cluster) {
    cluster.apply(&corpus("control-plane.yaml")).unwrap();
    let get = ["get", "controlplane", "controlplane", "-n", "istio-system", "-o", "json"];
    let plane: serde_json::Value = serde_json::from_str(&cluster.kubectl(get).unwrap()).unwrap();
    assert_eq!(plane["spec"]["telemetryStore"]["elastic"]["port"], "nine");
    assert_eq!(plane["spec"]["meshExpansion"]["gateway"]["unknown"], 1);
    assert_eq!(plane["spec"]["meshExpansion"]["onboarding"]["localRepository"], serde_json::json!({}));
}

/// Each condition and each issuer is somebody's own.
fn statuses(cluster: &Cluster) {
    let war = |condition: &str, lease: &str| {
        format!(
            "apiVersion: runtime.onboarding.tetrate.io/v1alpha1\nkind: WorkloadAutoRegistration\n\
             metadata: {{name: shared, namespace: bookinfo}}\n\
             status: {{conditions: [{{type: {condition}, status: 'False'}}], {lease}}}\n"
        )
    };
    cluster
        .apply(&corpus("war.yaml").replace("uid: x", "uid: '1'").replace("name: ratings-aws-", "name: shared # "))
        .unwrap();
    for (manager, condition, lease) in [
        ("plane", "AgentConnected", "lease: {anything: [1, {at: all}]}"),
        ("somebody", "Healthy", "observedGeneration: 1"),
    ] {
        let file = cluster.directory().join(format!("{manager}.status.yaml"));
        std::fs::write(&file, war(condition, lease)).unwrap();
        let manager = format!("--field-manager={manager}");
        cluster
            .kubectl(["apply", "--server-side", "--subresource=status", &manager, "-f", file.to_str().unwrap()])
            .unwrap();
    }
    let get = ["get", "war", "shared", "-n", "bookinfo", "-o", "jsonpath={.status.conditions[*].type} {.status.lease}"];
    assert_eq!(cluster.kubectl(get).unwrap(), r#"AgentConnected Healthy {"anything":[1,{"at":"all"}]}"#);
}

/// Each list, mapping and text that may be longer to a plane: what the API server refuses as too many, lint warns of, at the same place.
fn too_large(cluster: &Cluster) {
    let many = |item: &str, count: usize| vec![item; count].join(", ");
    let labels = |count: usize| (0..count).map(|n| format!("k{n}: v")).collect::<Vec<_>>().join(", ");
    let policy = |rules: &str| {
        format!(
            "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\n\
             metadata: {{name: large, namespace: bookinfo}}\nspec: {{allow: [{rules}]}}\n"
        )
    };
    let rule = |workloads: &str, groups: &str| format!("{{workloads: [{workloads}], onboardTo: [{groups}]}}");
    let every = "{workloadGroupSelector: {}}";
    let aws = |accounts: &str, more: &str| format!("{{aws: {{accounts: [{accounts}], ec2: {{}}{more}}}}}");
    let one = "'123456789012'";
    let jwt = |more: &str| format!("{{jwt: {{issuer: 'https://mycompany.corp', {more}}}}}");
    let select = |what: &str| format!("{{workloadGroupSelector: {{{what}}}}}");
    let plane = |onboarding: &str| {
        let heading = "apiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {name: large, namespace: istio-system}\n";
        format!("{heading}spec: {{meshExpansion: {{onboarding: {onboarding}}}}}\n")
    };
    let issuers = (0..33).map(|n| format!("{{issuer: 'https://i{n}.example', shortName: i{n}}}")).collect::<Vec<_>>();
    let documents = [
        policy(&many(&rule(&aws(one, ""), every), 33)),
        policy(&rule(&many(&aws(one, ""), 17), every)),
        policy(&rule(&aws(one, ""), &many(every, 33))),
        policy(&rule(&aws(&many(one, 257), ""), every)),
        policy(&rule(&aws(one, &format!(", regions: [{}]", many("us-east-2", 101))), every)),
        policy(&rule(&jwt(&format!("subjects: [{}]", many("x", 1025))), every)),
        policy(&rule(&jwt(&format!("attributes: [{}]", many("{name: a}", 33))), every)),
        policy(&rule(&jwt(&format!("attributes: [{{name: a, values: [{}]}}]", many("v", 101))), every)),
        policy(&rule(&aws(one, ""), &select(&format!("matchLabels: {{{}}}", labels(17))))),
        policy(&rule(
            &aws(one, ""),
            &select(&format!("matchExpressions: [{}]", many("{key: a, operator: Exists}", 17))),
        )),
        plane(&format!("{{endpoint: {{hosts: [{}], secretName: tls}}}}", many("a.example", 65))),
        plane(&format!(
            "{{endpoint: {{hosts: [a.example], secretName: tls}}, workloads: {{authentication: {{jwt: {{issuers: [{}]}}}}}}}}",
            issuers.join(", ")
        )),
    ];
    let onboardctl = onboarding_tests::world::binary("onboardctl").unwrap();
    for (document, answers) in documents.iter().zip(ask(cluster, &documents)) {
        let file = cluster.directory().join("large.yaml");
        std::fs::write(&file, document).unwrap();
        let lint = std::process::Command::new(&onboardctl).arg("lint").arg(&file).output().unwrap();
        let said = String::from_utf8(lint.stderr).unwrap();
        let warnings: Vec<_> = said.lines().filter(|line| line.contains("a cluster takes at most")).collect();
        let places: Vec<_> = answers
            .iter()
            .filter(|answer| answer.contains("Too many") || answer.contains("Too long"))
            .filter_map(|answer| Some(as_lint_writes(answer.split(": ").next()?)))
            .collect();
        assert!(lint.status.success() && !places.is_empty(), "{answers:?}; {said}");
        assert_eq!(warnings.len(), places.len(), "{answers:?}; {said}");
        for place in places {
            assert!(warnings.iter().any(|line| line.contains(&format!(": {place}: has "))), "{place}: {said}");
        }
    }
}

/// Rules may not cost more than the API server allows for one object, however large that is.
fn largest_policy(cluster: &Cluster) {
    let accounts = (0..256).map(|n| format!("'{n:012}'")).collect::<Vec<_>>().join(", ");
    let aws = format!("{{aws: {{accounts: [{accounts}], ec2: {{}}}}}}");
    let jwt = format!("{{jwt: {{issuer: 'https://a.example/{}', subjects: [x]}}}}", "x".repeat(230));
    let matchers = [vec![aws; 8], vec![jwt; 8]].concat().join(", ");
    let rule = format!(
        "  - workloads: [{matchers}]\n    onboardTo: [{{workloadGroupSelector: {{matchLabels: {{app: x}}}}}}]\n"
    );
    let policy = |rules: usize| {
        let heading = "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\n\
            metadata: {name: large, namespace: bookinfo}\nspec:\n  allow:\n";
        format!("{heading}{}", rule.repeat(rules))
    };
    // Not `apply`, which would write all of it into an annotation.
    assert_eq!(answers(&run("create", cluster, &policy(32))), Vec::<String>::new());
    assert_eq!(answers(&run("create", cluster, &policy(33))), ["spec.allow: Too many: 33: must have at most 32 items"]);
}
