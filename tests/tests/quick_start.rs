//! The commands of `docs/quick-start.md`, run as they stand there, in a machine of their own; and, where its mesh is up, what the
//! other pages tell people to type.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

use onboarding_testkit::netns::{Lab, test_inside};
use onboarding_testkit::process;
use onboarding_tests::world::{binary, envoy};
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        println!("quick_start: test");
        return ExitCode::SUCCESS;
    }
    let show = std::env::args().any(|argument| argument == "--nocapture");
    test_inside(|lab| match run(lab) {
        Ok(output) => {
            if show {
                println!("{output}");
            }
            println!("quick_start: ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("quick_start: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn run(lab: &Lab) -> anyhow::Result<String> {
    let machine = lab.machine("newcomer", 11)?;
    let script = machine.directory().join("quick-start.sh");
    std::fs::write(&script, format!("set -euxo pipefail\ncd {}\n{}", machine.directory().display(), commands()))?;
    let mut command = machine.command("bash");
    let programs = binary("onboarding-agent")?;
    let path = format!(
        "{}:{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        programs.parent().unwrap().display(),
        envoy()?.parent().unwrap().display()
    );
    command.arg(&script).env("PATH", path);
    let ended = process::run(command, Duration::from_secs(300))?;
    let output = format!("{}\n{}", ended.stderr, ended.stdout);
    anyhow::ensure!(ended.status.success(), "the commands ended with {}:\n{output}", ended.status);
    for expected in [
        "LIVE",
        "hello from behind the sidecar\nhello from behind the sidecar",
        "127.0.0.2 hello.demo hello.demo.svc hello.demo.svc.cluster.local",
        "hello-jwt-quick-start--my-machine",
        "checked: ['configuration', 'endpoint', 'clock', 'host'",
        "1 live workloads: 0 would lose their admission, 0 would gain it, nothing changes for 1.",
        "allowed: policy allow-my-machine admits this identity to the WorkloadGroup demo/hello",
        "demo/hello-jwt-quick-start--my-machine deleted; its host may come back, also with another key",
        "the agent has left the mesh and ends",
    ] {
        anyhow::ensure!(output.contains(expected), "the output lacks {expected:?}:\n{output}");
    }
    shown_as_said(&ended.stdout, &ended.stderr)?;
    documented_metrics(&std::fs::read_to_string(machine.directory().join("quick-start/metrics.txt"))?)?;
    Ok(output)
}

/// The blocks of the page that are marked `sh`, with those of the other pages before the policy is withdrawn.
fn commands() -> String {
    let page = include_str!("../../docs/quick-start.md");
    let (up, down) = page.split_once("## 8. ").expect("a step in which the policy is withdrawn");
    [blocks(up), blocks(include_str!("../../docs/sidecar.md")), OTHERS.to_owned(), blocks(down)].concat()
}

fn blocks(page: &str) -> String {
    page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```\n").next()).collect()
}

/// What the page shows as the programs' words is what they say, but for numbers, paths and how wide a column is.
fn shown_as_said(stdout: &str, stderr: &str) -> anyhow::Result<()> {
    let said = without_particulars(stdout).join("\n");
    // Where a note's place among the rest is nobody can say.
    let notes = without_particulars(stderr);
    let page = include_str!("../../docs/quick-start.md");
    let blocks: Vec<_> = page.split("```text\n").skip(1).filter_map(|rest| rest.split("```\n").next()).collect();
    anyhow::ensure!(blocks.len() == 3, "{} blocks of output are on the page", blocks.len());
    for block in blocks {
        // Of a long line the page shows the beginning; it is the last of its block.
        let mut shown = without_particulars(block.split(" ...").next().unwrap());
        shown.retain(|line| !notes.contains(line));
        let shown = shown.join("\n");
        anyhow::ensure!(said.contains(&shown), "the page shows\n{shown}\nand the programs say\n{said}");
    }
    Ok(())
}

fn without_particulars(text: &str) -> Vec<String> {
    let word = |word: &str| match word.starts_with('/') {
        true => "PATH".to_owned(),
        false => word.split(|c: char| c.is_ascii_digit()).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("#"),
    };
    let line = |line: &str| line.split_whitespace().map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(line).collect()
}

/// What stands between the lines of the agent reference, of operations, of the policy reference and of the standalone mesh.
const OTHERS: &str = r#"
"${agent[@]}" hosts --write
curl -sSf http://hello.demo:8080/
"${agent[@]}" check -o json | python3 -c 'import json, sys; print("checked:", [it["what"] for it in json.load(sys.stdin)])'
"${agent[@]}" status -o json | python3 -c 'import json, sys; json.load(sys.stdin)'
"${agent[@]}" completions bash > /dev/null
onboarding-plane standalone --help > /dev/null
curl -sSf http://127.0.0.1:15021/healthz
onboardctl --data-dir data status
onboardctl --data-dir data workloads -o json > wars.json
onboardctl plan -f manifests/ --workloads wars.json
echo '{"audience": "quick-start-plane"}' | ./plugin.sh | sed -E 's/.*"token":"([^"]*)".*/\1/' > token.jwt
onboardctl attest token.jwt --jwt-issuers manifests/controlplane.yaml > identity.yaml
onboardctl explain -f manifests/ --identity identity.yaml --group demo/hello
if command -v sqlite3; then
    sqlite3 -readonly data/registry.sqlite 'SELECT namespace, name, state, connection_since FROM registration'
    sqlite3 data/registry.sqlite '.backup backup.sqlite'
fi
onboardctl --data-dir data workloads delete demo/hello-jwt-quick-start--my-machine
until "${agent[@]}" status | grep 'Agent  *Connected' && onboardctl --data-dir data workloads | grep ' True '; do sleep 0.1; done
# A kind of event has its line among the metrics once there was one; plain text is a handshake that fails.
until curl -sSf http://127.0.0.1:15021/metrics > metrics.txt && grep connections_failed metrics.txt; do
    curl -s http://127.0.0.1:15443/ || true
done
"#;

/// The metrics that the pages name are those that there are.
fn documented_metrics(served: &str) -> anyhow::Result<()> {
    let pages = [include_str!("../../docs/operations.md"), include_str!("../../docs/standalone-mesh.md")].concat();
    let mut named = 0;
    for name in pages.split('`').skip(1).step_by(2).filter(|code| code.starts_with("onboarding_")) {
        let name = name.split('{').next().unwrap().trim_end_matches('*');
        let family = name.strip_suffix("_total").unwrap_or(name);
        anyhow::ensure!(served.contains(&format!("# TYPE {family}")), "there is no metric {name}");
        named += 1;
    }
    anyhow::ensure!(named > 15, "only {named} metrics are named");
    Ok(())
}
