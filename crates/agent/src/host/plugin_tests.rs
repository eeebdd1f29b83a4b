use super::*;
use std::time::Instant;

struct Scripts(tempfile::TempDir);

impl Scripts {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A shell script, executable, as a plugin named `test`.
    fn plugin(&self, body: &str) -> Plugin {
        let path = self.0.path().join("plugin.sh");
        // Written by another process: a file that this one has open for writing can't be executed while a concurrent test forks.
        let mut cat = std::process::Command::new("sh")
            .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut cat.stdin.take().unwrap(), format!("#!/bin/sh\n{body}\n").as_bytes()).unwrap();
        assert!(cat.wait().unwrap().success());
        Plugin {
            name: "test".to_owned(),
            path: Some(path.display().to_string()),
            args: vec!["--x=y".to_owned()],
            env: vec![("A".to_owned(), "b".to_owned())],
        }
    }

    fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

fn plugins(timeout: Duration) -> Plugins {
    Plugins::new(ConnectionSettings {
        timeout,
        initial_interval: Duration::from_millis(1),
        max_interval: Duration::from_millis(5),
    })
}

fn now() -> Timestamp {
    "2026-11-24T11:00:00Z".parse().unwrap()
}

async fn credential(plugin: &Plugin) -> Result<Credential, Problem> {
    plugins(Duration::from_secs(20)).credential(plugin, "plane-uid", now()).await.map_err(|error| {
        assert_eq!(error.name, "test");
        error.problem
    })
}

fn response(kind: &str, member: &str, expires_at: &str) -> String {
    format!(r#"{{"credential":{{"@type":"{kind}","{member}":"aa.bb.cc"}},"expiresAt":"{expires_at}"}}"#)
}

const KIND: &str = "type.googleapis.com/tetrateio.api.onboarding.private.JwtCredential";
const LATER: &str = "2026-11-24T12:00:00Z";

#[tokio::test]
async fn is_called_exactly_as_the_reference_says() {
    let scripts = Scripts::new();
    let seen = scripts.file("seen");
    let plugin = scripts.plugin(&format!(
        r#"{{ echo "$PLUGIN_NAME|$RPC_SERVICE_NAME|$RPC_METHOD_NAME|$A|$*"; cat; }} > '{seen}'
echo some diagnostics >&2
printf '%s' '{}'"#,
        response(KIND, "token", LATER)
    ));
    let credential = credential(&plugin).await.unwrap();
    assert_eq!(credential, Credential { token: "aa.bb.cc".to_owned(), expires_at: LATER.parse().unwrap() });
    assert_eq!(
        std::fs::read_to_string(&seen).unwrap(),
        "test|tetrateio.api.onboarding.private.component.agent.plugin.credential.v1alpha1.CredentialPlugin|GetCredential|b|--x=y\n{\"audience\":\"plane-uid\"}"
    );
    let plugin = scripts.plugin(&format!(
        r#"{{ echo "$RPC_SERVICE_NAME|$RPC_METHOD_NAME"; cat; }} > '{seen}'
echo '{{"host":{{"addresses":[{{"ip":"10.0.0.4","type":"VPC"}},{{"ip":"52.1.2.3","type":"INTERNET"}}]}}}}'"#
    ));
    let addresses = plugins(Duration::from_secs(20)).addresses(&plugin).await.unwrap();
    assert_eq!(
        addresses,
        [
            HostAddress { ip: "10.0.0.4".parse().unwrap(), kind: ConnectedOver::Vpc },
            HostAddress { ip: "52.1.2.3".parse().unwrap(), kind: ConnectedOver::Internet }
        ]
    );
    assert_eq!(
        std::fs::read_to_string(&seen).unwrap(),
        "tetrateio.api.onboarding.private.component.agent.plugin.hostinfo.v1alpha1.HostInfoPlugin|GetHostInfo\n{}"
    );
}

#[tokio::test]
async fn missing_and_not_executable_are_told_apart() {
    let scripts = Scripts::new();
    let mut plugin = scripts.plugin("true");
    let path = plugin.path.clone().unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(credential(&plugin).await, Err(Problem::NotExecutable(path)));
    plugin.path = Some("/no/such/plugin".to_owned());
    assert_eq!(credential(&plugin).await, Err(Problem::Missing("/no/such/plugin".to_owned())));
    plugin.path = None;
    let missing = Problem::Missing("onboarding-agent-test-plugin (on PATH)".to_owned());
    assert_eq!(find(&plugin, Some(scripts.0.path().into())), Err(missing));
    std::fs::rename(scripts.file("plugin.sh"), scripts.file("onboarding-agent-test-plugin")).unwrap();
    let found = find(&plugin, Some(scripts.0.path().into()));
    assert!(matches!(found, Err(Problem::NotExecutable(_))), "{found:?}");
}

#[tokio::test]
async fn one_that_hangs_is_killed_with_everything_that_it_started() {
    let scripts = Scripts::new();
    let pids = scripts.file("pids");
    let plugin = scripts.plugin(&format!("sleep 1000 &\necho $$ $! > '{pids}.part'; mv '{pids}.part' '{pids}'\nwait"));
    let within = Duration::from_secs(5);
    let problem = run(&plugin, "s", "m", "{}", within).await.unwrap_err();
    assert_eq!(problem, Problem::Hung(within));
    let started = Instant::now();
    let text = std::fs::read_to_string(&pids).unwrap();
    for pid in text.split_whitespace() {
        // Gone, or a zombie that init has yet to reap.
        let alive = || {
            std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
        };
        while alive() {
            assert!(started.elapsed() < Duration::from_secs(10), "{pid} is still there");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn one_that_leaves_a_child_with_its_pipes_is_not_waited_for() {
    let scripts = Scripts::new();
    let plugin = scripts.plugin(&format!("sleep 20 &\nprintf '%s' '{}'", response(KIND, "token", LATER)));
    let started = Instant::now();
    assert!(credential(&plugin).await.is_ok());
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn output_is_bounded() {
    let scripts = Scripts::new();
    let plugin =
        scripts.plugin("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done");
    assert_eq!(credential(&plugin).await, Err(Problem::TooMuch));
    // Megabytes of diagnostics are read and forgotten.
    let plugin = scripts.plugin(&format!(
        "dd if=/dev/zero bs=65536 count=64 >&2 2>/dev/null\nprintf '%s' '{}'",
        response(KIND, "token", LATER)
    ));
    assert!(credential(&plugin).await.is_ok());
}

#[tokio::test]
async fn nothing_garbage_and_deaths_each_have_their_words() {
    let scripts = Scripts::new();
    let cases = [
        ("true", "printed nothing"),
        ("echo '  '", "printed nothing"),
        ("echo Hello", "not a GetCredentialResponse in JSON: line 1"),
        ("echo '[]'", "it is not an object"),
        ("kill -9 $$", "killed by signal 9"),
        ("echo oops; exit 3", "exited with 3 and printed no google.rpc.Status"),
        (r#"echo '{"code":7,"message":"no such realm"}'; exit 1"#, r#"answered "no such realm" (code 7)"#),
        (r#"echo '{"code":0}'; exit 1"#, "exited with 1"),
    ];
    for (body, words) in cases {
        let problem = credential(&scripts.plugin(body)).await.unwrap_err().to_string();
        assert!(problem.contains(words), "{body}: {problem}");
    }
}

#[tokio::test]
async fn unavailable_is_tried_again_and_denied_is_not() {
    let scripts = Scripts::new();
    let count = scripts.file("count");
    let answer = response(KIND, "token", LATER);
    let plugin = scripts.plugin(&format!(
        r#"echo x >> '{count}'
if [ "$(wc -l < '{count}')" -lt 3 ]; then echo '{{"code":14,"message":"later"}}'; exit 1; fi
printf '%s' '{answer}'"#
    ));
    assert!(credential(&plugin).await.is_ok());
    std::fs::remove_file(&count).unwrap();
    let plugin = scripts.plugin(&format!(r#"echo x >> '{count}'; echo '{{"code":7,"message":"no"}}'; exit 1"#));
    assert_eq!(credential(&plugin).await, Err(Problem::Status { code: 7, message: "no".to_owned() }));
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 1);
}

#[tokio::test]
async fn an_expired_credential_is_refused() {
    let scripts = Scripts::new();
    let plugin = scripts.plugin(&format!("printf '%s' '{}'", response(KIND, "token", "2026-11-24T10:59:59Z")));
    let problem = credential(&plugin).await.unwrap_err().to_string();
    assert!(problem.contains("it expired at 2026-11-24T10:59:59Z"), "{problem}");
}

#[test]
fn every_spelling_of_a_jwt_credential_is_understood() {
    for kind in [KIND, "type.googleapis.com/JwtCredential", "a/b.c.JWTCREDENTIAL", "jwtcredential"] {
        for member in ["token", "jwt", "value"] {
            assert!(parse_credential(response(kind, member, LATER).as_bytes()).is_ok(), "{kind} {member}");
        }
    }
}

#[test]
fn credentials_are_refused_field_by_field() {
    let good = response(KIND, "token", LATER);
    assert!(parse_credential(good.as_bytes()).is_ok());
    for (from, to, words) in [
        (r#""credential":"#, r#""credentials":"#, "credential is missing"),
        (r#""@type""#, r#""type""#, "@type is missing"),
        ("JwtCredential", "OAuthCredential", "only a JwtCredential"),
        (r#""token""#, r#""tokens""#, "has no token"),
        ("aa.bb.cc", "aa.bb", "not a signed JWT"),
        ("aa.bb.cc", "aa.bb.", "not a signed JWT"),
        ("aa.bb.cc", "aa.b b.cc", "not a signed JWT"),
        (r#""expiresAt""#, r#""expires""#, "expiresAt is missing"),
        (LATER, "tomorrow", "expiresAt is not a time"),
    ] {
        let bad = good.replace(from, to);
        assert_ne!(bad, good);
        let problem = parse_credential(bad.as_bytes()).unwrap_err().to_string();
        assert!(problem.contains(words), "{bad}: {problem}");
        assert!(!problem.contains("aa.bb"), "the token is in the message: {problem}");
    }
}

#[test]
fn host_info_is_refused_field_by_field() {
    let good = r#"{"host":{"addresses":[{"ip":"10.0.0.4","type":"VPC"}]}}"#;
    assert!(parse_host_info(good.as_bytes()).is_ok());
    for (from, to, words) in [
        (r#""host""#, r#""hosts""#, "host.addresses is missing"),
        (r#"[{"ip":"10.0.0.4","type":"VPC"}]"#, "[]", "missing or empty"),
        ("10.0.0.4", "10.0.0", "addresses[0].ip is not an IP address"),
        ("10.0.0.4", "0.0.0.0", "addresses[0].ip is not an address that"),
        ("VPC", "LAN", "addresses[0].type is neither"),
    ] {
        let problem = parse_host_info(good.replace(from, to).as_bytes()).unwrap_err().to_string();
        assert!(problem.contains(words), "{problem}");
    }
}
