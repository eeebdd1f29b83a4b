//! The verbs that ask a plane: `workloads`, `status`, `plan`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod admin_socket;
mod tool;

use admin_socket::Plane;
use jiff::{SignedDuration, Timestamp};
use onboarding_core::identity::{
    Attested, AwsCompute, AwsIdentity, Fact, Identity, JwtIdentity, Proven, Replay, Thumbprint,
};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::{
    ConnectedOver, Connection, DisconnectReason, Health, HostAddress, HostReport, KeyMemory, Live,
};
use onboarding_kinds::war;
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::path::Path;
use tool::{Dir, GROUP, NARROW, control_plane};

const EC2: &str = "ratings-aws-aws-123456789012-us-east-2b-ec2-i-1234567890abcdef0";
const VM: &str = "ratings-jwt-my-corp--vm007";

fn proven(value: &str) -> Fact<String> {
    Fact::Proven(Proven::by_attestor(value.to_owned()))
}

fn ec2(role: &str) -> Identity {
    Identity::Aws(AwsIdentity {
        partition: proven("aws"),
        account: proven("123456789012"),
        region: proven("us-east-2"),
        zone: proven("us-east-2b"),
        compute: AwsCompute::Ec2 { instance_id: proven("i-1234567890abcdef0"), iam_role: Some(proven(role)) },
    })
}

fn vm() -> Identity {
    Identity::Jwt(JwtIdentity {
        issuer: proven("https://mycompany.corp"),
        subject: proven("vm007"),
        attributes: Default::default(),
    })
}

/// The resource as a plane makes it, created 65 minutes ago.
fn war(namespace: &str, name: &str, identity: Identity, lost: Option<DisconnectReason>) -> Value {
    let created_at = Timestamp::now() - SignedDuration::from_mins(65);
    let key = KeyMemory { thumbprint: Thumbprint([1; 32]), replay: Replay::Forever };
    let connected = Connection::Connected { replica: "plane-0".to_owned(), session: "s".to_owned(), since: created_at };
    let live = Live {
        group: GroupName { namespace: namespace.to_owned(), name: "ratings".to_owned() },
        attested: Attested { identity, issuer_short_name: None, replay: key.replay },
        key,
        report: HostReport {
            agent_version: "0.1.0".to_owned(),
            addresses: vec![HostAddress { ip: [10, 0, 0, 4].into(), kind: ConnectedOver::Vpc }],
            ..HostReport::default()
        },
        created_at,
        token_expires_at: Timestamp::MAX,
        connection: lost.map_or(connected, |reason| Connection::Disconnected { since: created_at, reason }),
        health: Health { ready: true, message: String::new() },
        health_since: created_at,
    };
    war::resource(&RegistrationName { namespace: namespace.to_owned(), name: name.to_owned() }, &live, None)
}

/// A plane with these workloads, in the directory that the verbs run in.
fn plane(wars: &[Value]) -> (Dir, Plane) {
    let dir = Dir::new();
    let plane = Plane::start(&dir);
    plane.answers("GET /v1/workloads", 200, json!({ "items": wars }));
    (dir, plane)
}

// ---- workloads ----

#[test]
fn the_table_has_the_columns_of_kubectl() {
    let (dir, _plane) = plane(&[
        war("bookinfo", VM, vm(), Some(DisconnectReason::ConnectionLost)),
        war("bookinfo", EC2, ec2("ratings-role"), None),
    ]);
    let table = dir.run(&["workloads", "--data-dir", "."]).is(0).stdout;
    let wide = EC2.len();
    assert_eq!(
        table,
        format!(
            "{:wide$}   AGENT CONNECTED   AGE\n{EC2}   True              65m\n{VM:wide$}   False             65m\n",
            "NAME"
        )
    );
    let table = dir.run(&["workloads", "--data-dir", ".", "-n", "bookinfo", "-o", "wide"]).is(0).stdout;
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, [EC2, "True", "65m", "ratings", "True", "10.0.0.4", "plane-0", "0.1.0"]);
    assert!(table.lines().nth(2).unwrap().contains("<none>"), "{table}");
    dir.run(&["workloads", "--data-dir", ".", "-A"]).is(0).says("NAMESPACE   NAME ").says("bookinfo    ratings-aws");
    dir.run(&["workloads", "--data-dir", ".", "-n", "other"])
        .is(0)
        .silent()
        .complains("No workloads are registered in the namespace other.");
}

#[test]
fn several_namespaces_are_told_apart() {
    let (dir, _plane) =
        plane(&[war("other", VM, vm(), None), war("bookinfo", VM, vm(), None), war("bookinfo", EC2, ec2("a"), None)]);
    let table = dir.run(&["workloads", "--data-dir", "."]).is(0).stdout;
    let names: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().take(2).collect()).collect();
    assert_eq!(names, [["NAMESPACE", "NAME"], ["bookinfo", EC2], ["bookinfo", VM], ["other", VM]]);
    let table = dir.run(&["workloads", "--data-dir", ".", "-n", "bookinfo"]).is(0).stdout;
    assert!(table.starts_with("NAME ") && table.lines().count() == 3, "{table}");
}

#[test]
fn lists_for_programs_are_the_resources() {
    let wars = [war("bookinfo", EC2, ec2("ratings-role"), None)];
    let (dir, _plane) = plane(&wars);
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": wars });
    assert_eq!(dir.run(&["workloads", "--data-dir", ".", "-A", "-o", "json"]).is(0).json(), list);
    let yaml = dir.run(&["workloads", "--data-dir", ".", "-o", "yaml"]).is(0).stdout;
    assert_eq!(serde_yaml_ng::from_str::<Value>(&yaml).unwrap(), list);
    // An account stays text for whoever reads it next.
    dir.write("wars.yaml", &yaml);
    dir.run(&["lint", "wars.yaml"]).is(0);
    let (dir, _plane) = plane(&[]);
    assert_eq!(dir.run(&["workloads", "--data-dir", ".", "-o", "json"]).is(0).json()["items"], json!([]));
}

#[test]
fn a_registration_is_deleted_by_its_name() {
    let (dir, plane) = plane(&[]);
    let request = format!("DELETE /v1/workloads/bookinfo/{EC2}");
    let name = format!("bookinfo/{EC2}");
    for (deleted, forgotten, said) in [
        (true, true, "deleted; its host may come back, also with another key"),
        (false, true, "had ended already; its key is forgotten"),
        (false, false, "had ended already, and no key was remembered"),
    ] {
        plane.answers(&request, 200, json!({ "deleted": deleted, "keyForgotten": forgotten }));
        dir.run(&["workloads", "delete", &name, "--data-dir", "."]).is(0).says(&format!("{name} {said}"));
        dir.run(&["workloads", "delete", EC2, "-n", "bookinfo", "--data-dir", "."]).is(0).says(said);
        dir.run(&["workloads", "-n", "bookinfo", "delete", &name, "--data-dir", "."]).is(0).says(said);
        assert_eq!(plane.asked(), [&*request, &*request, &*request]);
    }
}

#[test]
fn what_is_not_registered_is_said_and_the_rest_is_deleted() {
    let (dir, plane) = plane(&[]);
    plane.answers("DELETE /v1/workloads/bookinfo/a", 404, json!({ "message": "bookinfo/a isn't registered" }));
    plane.answers("DELETE /v1/workloads/bookinfo/b", 200, json!({ "deleted": true, "keyForgotten": true }));
    dir.run(&["workloads", "delete", "bookinfo/a", "bookinfo/b", "--data-dir", "."])
        .is(1)
        .says("bookinfo/b deleted")
        .complains("deleting bookinfo/a: bookinfo/a isn't registered; onboardctl workloads lists those that there are");
}

#[test]
fn a_name_that_is_none_is_not_asked_for() {
    let (dir, plane) = plane(&[]);
    for (arguments, why) in [
        (&["a"][..], "name its namespace too"),
        (&["bookinfo/../../x"], "isn't a name"),
        (&["bookinfo/a?force=1"], "isn't a name"),
        (&["bookinfo/A"], "isn't a name"),
        (&["/a"], "isn't a name"),
        (&["bookinfo/a", "-n", "other"], "isn't of the namespace other"),
        (&["bookinfo/b", "bookinfo/%2e"], "isn't a name"),
    ] {
        let arguments = [&["workloads", "delete", "--data-dir", "."], arguments].concat();
        dir.run(&arguments).is(1).silent().complains(why);
    }
    dir.run(&["workloads", "delete", "--data-dir", "."]).is(1).silent().complains("Usage:");
    assert_eq!(plane.asked(), [""; 0]);
}

// ---- status ----

#[test]
fn a_plane_says_whether_it_is_ready() {
    let (dir, plane) = plane(&[]);
    let mut status = json!({
        "ready": true, "missing": [], "faults": [], "sessions": 3, "uid": "a-uid",
        "hosts": ["onboarding-endpoint.your-company.corp", "10.0.0.1"], "generation": 7,
    });
    plane.answers("GET /v1/status", 200, &status);
    assert_eq!(
        dir.run(&["status", "--data-dir", "."]).is(0).stdout,
        "The plane is ready.\n\
         UID            a-uid\n\
         Hosts          onboarding-endpoint.your-company.corp, 10.0.0.1\n\
         Sessions       3\n\
         Configuration  generation 7\n"
    );
    status["ready"] = false.into();
    status["missing"] = json!(["the certificate"]);
    status["policyUnreadable"] = true.into();
    status["faults"] = json!(["policy.yaml:6: \u{1b}[2J"]);
    plane.answers("GET /v1/status", 200, &status);
    let ended =
        dir.run(&["status", "--data-dir", "."]).is(1).says("The plane is not ready.\n  missing: the certificate\n");
    ended
        .says("A policy can't be read: sessions are suspended")
        .says("Faults of the configuration:\n  policy.yaml:6: \\u{1b}[2J\n");
    assert_eq!(dir.run(&["status", "--data-dir", ".", "-o", "json"]).is(1).json(), status);
}

#[test]
fn the_root_of_the_mesh_is_shown_and_replaced() {
    let (dir, plane) = plane(&[]);
    let mut root =
        json!({"stage": "steady", "roots": "one root, 0011", "endsAt": "2036-11-24T10:00:00Z", "nextStepAt": null});
    plane.answers("GET /v1/mesh/root", 200, &root);
    let steady = "Stage  steady\nRoots  one root, 0011\nEnds   2036-11-24T10:00:00Z\n";
    assert_eq!(dir.run(&["mesh", "root", "--data-dir", "."]).is(0).stdout, steady);
    root["stage"] = "introducing".into();
    root["nextStepAt"] = "2026-11-25T10:05:00Z".into();
    plane.answers("POST /v1/mesh/root", 200, &root);
    let ended = dir.run(&["mesh", "rotate-root", "--data-dir", "."]).is(0);
    ended.says("Stage  introducing\n").says("Next   2026-11-25T10:05:00Z\n");
    assert_eq!(dir.run(&["mesh", "rotate-root", "--data-dir", ".", "-o", "json"]).is(0).json(), root);
    plane.answers("POST /v1/mesh/root", 409, json!({"message": "the mesh's root is being replaced already"}));
    let refused = dir.run(&["mesh", "rotate-root", "--data-dir", "."]).is(1);
    assert!(refused.stderr.contains("being replaced already"), "{}", refused.stderr);
}

#[test]
fn the_socket_is_found_by_flag_then_environment() {
    let (dir, plane) = plane(&[]);
    plane.answers("GET /v1/status", 200, json!({ "ready": true }));
    let here = Path::new(".");
    let nowhere = Path::new("nowhere");
    let socket = plane.socket.as_path();
    dir.run(&["status", "--socket", "admin.sock"]).is(0);
    dir.run(&["--data-dir", ".", "status"]).is(0);
    dir.run_with(&["status"], "", &[("ONBOARDING_ADMIN_SOCKET", socket)]).is(0);
    dir.run_with(&["status"], "", &[("ONBOARDING_DATA_DIR", here)]).is(0);
    let both = [("ONBOARDING_ADMIN_SOCKET", nowhere), ("ONBOARDING_DATA_DIR", here)];
    dir.run_with(&["status"], "", &both).is(1).complains("asking the plane at nowhere");
    dir.run_with(&["status", "--data-dir", "."], "", &both).is(0);
    dir.run_with(&["status", "--data-dir", "x", "--socket", "admin.sock"], "", &both).is(0);
    dir.run(&["status"]).is(1).complains("/var/lib/onboarding-plane/admin.sock");
}

#[test]
fn a_plane_that_does_not_answer_is_said_with_the_way_out() {
    let dir = Dir::new();
    let ended = dir.run(&["status", "--data-dir", "."]).is(1).silent();
    ended.complains("asking the plane at ./admin.sock: No such file or directory").complains("--data-dir");
    drop(UnixListener::bind(dir.path("admin.sock")).unwrap());
    dir.run(&["workloads", "--data-dir", "."]).is(1).silent().complains("no plane listens there");

    let (dir, plane) = plane(&[]);
    dir.run(&["status", "--data-dir", "."]).is(1).silent().complains("asking the plane at ./admin.sock");
    for (status, body, why) in [
        (200, "<html>", "the plane's answer to /v1/status isn't JSON"),
        (500, "<html>", "the plane answered 500"),
        (503, r#"{"message": "the registry is \u001b[2Jaway"}"#, "the registry is \\u{1b}[2Jaway"),
        (404, "{}", "the plane answered 404"),
    ] {
        plane.answers("GET /v1/status", status, body);
        dir.run(&["status", "--data-dir", "."]).is(1).silent().complains(why);
    }
    for body in [json!([]), json!({ "items": {} })] {
        plane.answers("GET /v1/workloads", 200, body);
        dir.run(&["workloads", "--data-dir", "."]).is(1).silent().complains("is it of another version?");
    }
}

// ---- plan ----

const VMS: &str = "\
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {name: vms, namespace: bookinfo}
spec:
  allow:
  - workloads: [{jwt: {issuer: 'https://mycompany.corp'}}]
    onboardTo: [{workloadGroupSelector: {}}]
";

const PLAN: [&str; 5] = ["plan", "-f", "m", "--data-dir", "."];

/// An instance and a VM that live, and manifests that admit both.
fn planned() -> (Dir, Plane) {
    let (dir, plane) = plane(&[war("bookinfo", EC2, ec2("ratings-role"), None), war("bookinfo", VM, vm(), None)]);
    for (name, text) in [("m/narrow.yaml", NARROW), ("m/vms.yaml", VMS), ("m/group.yaml", GROUP)] {
        dir.write(name, text);
    }
    (dir, plane)
}

#[test]
fn nothing_changes() {
    let (dir, _plane) = planned();
    let said = "2 live workloads: 0 would lose their admission, 0 would gain it, nothing changes for 2.\n";
    assert_eq!(dir.run(&PLAN).is(0).stdout, said);
    let none = json!({ "lose": [], "gain": [], "unchanged": 2 });
    assert_eq!(dir.run(&[&PLAN[..], &["-o", "json"]].concat()).is(0).json(), none);
}

#[test]
fn who_would_lose_admission_and_why() {
    let (dir, _plane) = planned();
    dir.write("m/narrow.yaml", NARROW.replace("ratings-role", "other-role"));
    let why = "policy allow-narrow-subset-of-aws-ec2-instances: spec.allow[0].workloads[0].aws.ec2.iamRoleNames: is \"ratings-role\", wanted \"other-role\"";
    dir.run(&PLAN)
        .is(3)
        .says(&format!("bookinfo/{EC2} (WorkloadGroup bookinfo/ratings) would lose its admission\n  {why}\n"))
        .says("2 live workloads: 1 would lose their admission, 0 would gain it, nothing changes for 1.\n");
    let plan = dir.run(&[&PLAN[..], &["-o", "json"]].concat()).is(3).json();
    let lost = &plan["lose"][0];
    assert_eq!(
        (&lost["namespace"], &lost["name"], &lost["group"]),
        (&json!("bookinfo"), &json!(EC2), &json!("ratings"))
    );
    assert_eq!((&lost["reasons"][0], &plan["unchanged"]), (&json!(why), &json!(1)));

    // The group is gone, and with it everybody.
    let (dir, _plane) = planned();
    dir.write("m/group.yaml", "");
    dir.run(&PLAN).is(3).says("the WorkloadGroup bookinfo/ratings doesn't exist").says("2 would lose");
}

#[test]
fn an_issuer_that_is_not_listed_any_more_ends_renewal() {
    let (dir, _plane) = planned();
    let listed = r#"[{"issuer": "https://mycompany.corp", "shortName": "my-corp"}]"#;
    dir.write("m/plane.yaml", control_plane("", listed));
    dir.run(&PLAN).is(0);
    dir.write("m/plane.yaml", control_plane("", "[]"));
    dir.run(&PLAN).is(3).says("the ControlPlane doesn't list the issuer \"https://mycompany.corp\"");
}

#[test]
fn who_would_gain_admission() {
    let unreadable = Some(DisconnectReason::PolicyUnreadable);
    let (dir, plane) = planned();
    let wars = [war("bookinfo", EC2, ec2("ratings-role"), unreadable), war("bookinfo", VM, vm(), None)];
    plane.answers("GET /v1/workloads", 200, json!({ "items": wars }));
    dir.run(&PLAN)
        .is(3)
        .says(&format!(
            "bookinfo/{EC2} (WorkloadGroup bookinfo/ratings) would gain its admission\n  policy allow-narrow"
        ))
        .says("0 would lose their admission, 1 would gain it");
    // Refused before and after: nothing changes for it.
    dir.write("m/narrow.yaml", NARROW.replace("ratings-role", "other-role"));
    dir.run(&PLAN).is(0);
}

#[test]
fn what_the_plane_says_of_now_is_what_a_plan_is_compared_with() {
    let (dir, plane) = planned();
    let said = |admitted: [Value; 2]| {
        let mut wars = [war("bookinfo", EC2, ec2("ratings-role"), None), war("bookinfo", VM, vm(), None)];
        for (war, admitted) in wars.iter_mut().zip(admitted) {
            war["status"]["admitted"] = admitted;
        }
        plane.answers("GET /v1/workloads", 200, json!({ "items": wars }));
    };
    said([true.into(), true.into()]);
    dir.run(&PLAN).is(0);
    // Connected still, though the policies of the plane don't admit it.
    said([false.into(), true.into()]);
    dir.run(&PLAN)
        .is(3)
        .says(&format!("bookinfo/{EC2} (WorkloadGroup bookinfo/ratings) would gain its admission"))
        .says("0 would lose their admission, 1 would gain it, nothing changes for 1.");
    // One of each in one plan.
    dir.write("m/vms.yaml", "");
    dir.run(&PLAN)
        .is(3)
        .says(&format!("bookinfo/{VM} (WorkloadGroup bookinfo/ratings) would lose"))
        .says("1 would gain");
    dir.write("m/narrow.yaml", "");
    said([false.into(), false.into()]);
    dir.run(&PLAN).is(0).says("nothing changes for 2.");
    said(["yes".into(), true.into()]);
    dir.run(&PLAN).is(1).silent().complains(&format!("bookinfo/{EC2}: status.admitted is no boolean"));
}

#[test]
fn a_list_in_a_file_serves_as_well() {
    let (dir, plane) = planned();
    let list = dir.run(&["workloads", "--data-dir", ".", "-o", "json"]).is(0).stdout;
    dir.write("wars.json", &list);
    dir.write("m/narrow.yaml", "");
    plane.asked();
    dir.run_with(&["plan", "-f", "m", "--workloads", "-"], &list, &[]).is(3);
    dir.run_with(&["plan", "-f", "-", "--workloads", "-"], &list, &[])
        .is(1)
        .complains("standard input can be read once");
    dir.run(&["plan", "-f", "m", "--workloads", "wars.json"]).is(3).says("1 would lose");
    assert_eq!(plane.asked(), [""; 0]);
    for (text, why) in [
        ("{", "wars.json isn't JSON"),
        ("{}", "isn't a list of WorkloadAutoRegistrations"),
        ("[{}]", "has no namespace or no name"),
        (&list.replace("ownerReferences", "owners"), "has no WorkloadGroup among its ownerReferences"),
        (&list.replace("123456789012\",", "12\","), "spec.identity: aws.account"),
    ] {
        dir.write("wars.json", text);
        dir.run(&["plan", "-f", "m", "--workloads", "wars.json"]).is(1).silent().complains(why);
    }
}

#[test]
fn manifests_with_faults_are_no_plan() {
    let (dir, _plane) = planned();
    dir.write("m/vms.yaml", VMS.replace("issuer", "isuer"));
    dir.run(&PLAN)
        .is(1)
        .silent()
        .complains("nobody can say what they would admit: m/vms.yaml:6")
        .complains("and 1 more");
    dir.run(&["plan", "-f", "nowhere", "--data-dir", "."]).is(1).silent().complains("reading nowhere");
    dir.run(&["plan", "--data-dir", "."]).is(1).silent().complains("Usage:");
}
