//! What is shipped for clouds: task definition and user data, and the documents and scripts that they carry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tool::Dir;

fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(shipped(path)).unwrap()
}

fn without_a_fault(document: &str) {
    let dir = Dir::with(&[("document.yaml", document)]);
    let ended = dir.run(&["lint", "document.yaml"]).is(0).silent();
    assert_eq!(ended.stderr, "", "{document}");
}

fn of_sh(script: &str, shell: &str) {
    let dir = Dir::with(&[("script", script)]);
    let checked = Command::new(shell).arg("-n").arg(dir.path("script")).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn the_task_definition_is_one_and_its_documents_are_without_faults() {
    let definition: Value = serde_json::from_str(&read("docs/ecs/task-definition")).unwrap();
    assert_eq!(definition["networkMode"], "awsvpc");
    assert!(definition["taskRoleArn"].as_str().unwrap().ends_with(":role/ratings-role"));
    let containers = definition["containerDefinitions"].as_array().unwrap();
    let [application, agent] = &containers[..] else { panic!("{containers:?}") };
    assert_eq!(agent["name"], "onboarding-agent");
    let variable = |name: &str| {
        let all = agent["environment"].as_array().unwrap();
        all.iter().find(|variable| variable["name"] == name).unwrap()["value"].as_str().unwrap().to_owned()
    };
    without_a_fault(&variable("ONBOARDING_CONFIG"));
    without_a_fault(&variable("AGENT_CONFIG"));
    assert_eq!(agent["secrets"][0]["name"], "ONBOARDING_AGENT_ROOT_CERTS");
    // The role that the policy beside it admits, and no more than the image needs.
    assert!(read("docs/ecs/onboardingpolicy.yaml").contains("- ratings-role\n"));
    assert_eq!(agent["user"], "65532:65532");
    assert_eq!(agent["readonlyRootFilesystem"], true);
    assert_eq!(agent["linuxParameters"]["capabilities"]["drop"], serde_json::json!(["ALL"]));
    assert_eq!(agent["mountPoints"][0]["containerPath"], "/var/lib/onboarding-agent");
    assert_eq!(agent["mountPoints"][0]["sourceVolume"], definition["volumes"][0]["name"]);
    // The agent stops before the application, and has more than the 29 s that it takes at most.
    assert_eq!(agent["dependsOn"][0]["containerName"], application["name"]);
    assert_eq!(application.get("dependsOn"), None);
    let stop = agent["stopTimeout"].as_u64().unwrap();
    assert!((30..=120).contains(&stop), "{stop}");
}

#[test]
fn user_data_of_cloud_init_is_yaml_of_modules_that_it_has() {
    let text = read("docs/cloud-init/user-data");
    assert!(text.starts_with("#cloud-config\n"));
    let data: serde_json::Map<String, Value> = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(data.keys().map(String::as_str).collect::<Vec<_>>(), ["packages", "write_files", "runcmd"]);
    let files = data["write_files"].as_array().unwrap();
    let content = |path: &str| {
        let file = files.iter().find(|file| file["path"].as_str().unwrap().ends_with(path)).unwrap();
        assert!(file["permissions"].is_string(), "YAML 1.1 has other octal numbers: {file}");
        file["content"].as_str().unwrap().to_owned()
    };
    without_a_fault(&content("onboarding.config.yaml"));
    let script = content("install.sh");
    of_sh(&script, "sh");
    commands_of_the_requirement(
        &script.replace("$package", "onboarding-agent"),
        "apt-get -o DPkg::Lock::Timeout=600 install -y \"./",
    );
    for command in data["runcmd"].as_array().unwrap() {
        // No shell in between; and no file of ours as a program, for /run and /tmp may be mounted noexec.
        let program = command[0].as_str().unwrap();
        assert!(["sh", "systemctl", "update-ca-certificates"].contains(&program), "{command}");
    }
}

#[test]
fn user_data_of_aws_is_a_script_that_does_what_the_requirement_says() {
    let script = read("docs/cloud-init/user-data.sh");
    of_sh(&script, "bash");
    let (_, rest) = script.split_once("<<YAML\n").unwrap();
    let (document, _) = rest.split_once("\nYAML\n").unwrap();
    without_a_fault(&document.replace("$endpoint", "onboarding-endpoint.your-company.corp"));
    let of_deb = script.replace("$package.$format", "onboarding-agent.deb");
    commands_of_the_requirement(&of_deb, "\"${install[@]}\" \"./");
    assert!(script.contains("install=(apt-get -o DPkg::Lock::Timeout=600 install -y)\n"), "{script}");
}

/// "Installing Workload Onboarding Agent DEB Package".
fn commands_of_the_requirement(script: &str, install: &str) {
    for wanted in [
        "/onboarding-agent.deb\"",
        "/onboarding-agent.deb.sha256\"",
        "sha256sum --check \"onboarding-agent.deb.sha256\"",
        &format!("{install}onboarding-agent.deb\""),
        "curl -fLO ",
        "onboarding-endpoint.your-company.corp",
        "systemctl enable --now onboarding-agent",
    ] {
        assert!(script.contains(wanted), "{wanted}: {script}");
    }
}
