//! The commands of `docs/policy-reference.md`, run one after the other, say what the page says they say.
//!
//! `UPDATE_DOCUMENTS=1` writes into the page what they said.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod admin_socket;
mod tool;

use admin_socket::Plane;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use tool::Dir;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn war(name: &str, identity: Value) -> Value {
    json!({
        "metadata": {
            "namespace": "bookinfo",
            "name": name,
            "ownerReferences": [{ "kind": "WorkloadGroup", "name": "ratings" }],
        },
        "spec": { "identity": identity },
        "status": { "admitted": true },
    })
}

/// What the page takes for granted: manifests, an identity, and a plane with an instance and a VM.
fn world() -> (Dir, Plane) {
    let dir = Dir::new();
    let example = |name: &str| std::fs::read_to_string(root().join("examples").join(name)).unwrap();
    for name in ["onboardingpolicy-narrow.yaml", "onboardingpolicy-jwt.yaml", "workloadgroup.yaml"] {
        dir.write(&format!("manifests/{name}"), example(name));
    }
    dir.write("identity.yaml", std::fs::read_to_string(root().join("docs/identities/ec2-role-claimed.yaml")).unwrap());
    let plane = Plane::start(&dir);
    let ec2 = json!({ "aws": {
        "partition": "aws",
        "account": "123456789012",
        "region": "us-east-2",
        "zone": "us-east-2b",
        "ec2": { "instanceId": "i-1234567890abcdef0", "iamRole": { "name": "ratings-role" } },
    }});
    let vm = json!({ "jwt": {
        "issuer": "https://mycompany.corp",
        "subject": "us-east-datacenter1-vm007",
        "attributes": { "region": "us-east", "instance_role": "app-ratings" },
    }});
    let wars = [
        war("ratings-aws-aws-123456789012-us-east-2b-ec2-i-1234567890abcdef0", ec2),
        war("ratings-jwt-my-corp--us-east-datacenter1-vm007", vm),
    ];
    plane.answers("GET /v1/workloads", 200, json!({ "items": wars }));
    (dir, plane)
}

/// The page with each console's outputs replaced by those that its commands have now.
fn replayed(page: &str, dir: &Dir, plane: &Plane) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_onboardctl")).parent().unwrap();
    let path = std::env::join_paths(
        std::iter::once(bin.to_owned()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let path = path.unwrap();
    let (mut out, mut in_console, mut code) = (String::new(), false, 0);
    for line in page.lines() {
        if line.starts_with("```") {
            in_console = line == "```console";
        }
        match line.strip_prefix("$ ") {
            Some(command) if in_console => {
                let script = format!("exec 2>&1; (exit {code}); {command}");
                let mut shell = Command::new("sh");
                shell.args(["-c", &script]).current_dir(dir.path(".")).env("PATH", &path);
                shell.env("ONBOARDING_ADMIN_SOCKET", &plane.socket);
                let output = shell.output().unwrap();
                code = output.status.code().unwrap();
                let _ = write!(out, "{line}\n{}", String::from_utf8(output.stdout).unwrap());
            }
            _ if in_console && line != "```console" => {}
            _ => {
                let _ = writeln!(out, "{line}");
            }
        }
    }
    out
}

#[test]
fn the_policy_reference_shows_what_its_commands_say() {
    let path = root().join("docs/policy-reference.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (dir, plane) = world();
    let now = replayed(&page, &dir, &plane);
    assert!(now.contains("would lose its admission\n"), "the page has no consoles: {now}");
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        std::fs::write(&path, &now).unwrap();
        return;
    }
    let differs = page.lines().zip(now.lines()).find(|(shown, said)| shown != said);
    assert!(page == now, "the page and the commands differ, first in (shown, said): {differs:?}");
}
