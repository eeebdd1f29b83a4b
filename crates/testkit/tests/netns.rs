//! The lab itself: what is promised of machines, and that nothing outlives them. Without libtest, because [`inside`] comes first.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

use onboarding_testkit::netns::{Lab, test_inside};
use onboarding_testkit::process::{Process, run};
use std::net::Ipv4Addr;
use std::process::{Command, ExitCode};
use std::time::Duration;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    test_inside(|lab| {
        if std::env::args().any(|argument| argument == "stay") {
            stay(lab);
        }
        machines_reach_each_other(lab);
        machines_have_their_own_loopback_and_names(lab);
        power_off_ends_everything_in_one_machine(lab);
        nothing_outlives_a_killed_lab(lab);
        println!("netns: ok");
        ExitCode::SUCCESS
    })
}

const SERVE: &str = "import http.server,sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'hello from ' + sys.argv[1].encode())
s = http.server.HTTPServer((sys.argv[2], 80), H)
print('up', flush=True)
s.serve_forever()
";

fn serve(machine: &onboarding_testkit::netns::Machine, listen: &str) -> Process {
    let mut command = machine.command("python3");
    command.args(["-c", SERVE, machine.name(), listen]);
    let server = Process::start("server", command, None).unwrap();
    server.wait_for_line(Duration::from_secs(10), |line| line == "up").unwrap();
    server
}

fn machines_reach_each_other(lab: &Lab) {
    let (one, two) = (lab.machine("one", 11).unwrap(), lab.machine("two", 12).unwrap());
    let _server = serve(&one, "0.0.0.0");
    assert_eq!(two.check("curl", ["-sS", "-m", "5", "http://10.99.0.11/"]).unwrap(), "hello from one");
    one.set_link(false).unwrap();
    assert!(two.check("curl", ["-sS", "-m", "0.3", "http://10.99.0.11/"]).is_err());
    one.set_link(true).unwrap();
    assert_eq!(two.check("curl", ["-sS", "-m", "5", "http://10.99.0.11/"]).unwrap(), "hello from one");
}

fn machines_have_their_own_loopback_and_names(lab: &Lab) {
    let (one, two) = (lab.machine("one", 11).unwrap(), lab.machine("two", 12).unwrap());
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    one.add_loopback_address(metadata).unwrap();
    one.add_host(metadata, "metadata.example").unwrap();
    let _server = serve(&one, "169.254.169.254");
    assert_eq!(one.check("curl", ["-sS", "-m", "5", "http://metadata.example/"]).unwrap(), "hello from one");
    assert!(two.check("curl", ["-sS", "-m", "1", "http://metadata.example/"]).is_err());
    assert_eq!(two.check("hostname", [""; 0]).unwrap().trim(), "two");
    assert!(!std::fs::read_to_string("/etc/hosts").unwrap().contains("metadata.example"));
}

fn power_off_ends_everything_in_one_machine(lab: &Lab) {
    let (one, two) = (lab.machine("one", 11).unwrap(), lab.machine("two", 12).unwrap());
    let (gone, stays) = (serve(&one, "0.0.0.0"), serve(&two, "0.0.0.0"));
    // One that has left its group and its parent.
    one.check("sh", ["-c", "setsid sleep 1000 >/dev/null 2>&1 & echo started"]).unwrap();
    one.power_off().unwrap();
    assert!(!gone.wait(Duration::from_secs(5)).unwrap().success());
    assert!(stays.status().is_none());
    assert!(!one.check("ps", ["-eo", "args"]).unwrap().contains("sleep 1000"));
}

/// A lab in which this program is told to stay, with a process that ignores every polite signal.
fn stay(lab: &Lab) -> ! {
    let machine = lab.machine("stay", 11).unwrap();
    let mut command = machine.command("sh");
    command.args(["-c", "trap '' INT TERM HUP; sleep 4321 & echo up; wait; wait"]);
    let stubborn = Process::start("stubborn", command, None).unwrap();
    stubborn.wait_for_line(Duration::from_secs(5), |line| line == "up").unwrap();
    println!("staying");
    loop {
        std::thread::park();
    }
}

fn nothing_outlives_a_killed_lab(lab: &Lab) {
    let leftovers = || {
        let processes = run(
            {
                let mut command = Command::new("ps");
                command.args(["-eo", "args"]);
                command
            },
            Duration::from_secs(5),
        );
        let processes = processes.unwrap().stdout;
        processes.lines().filter(|line| *line == "sleep 4321" || line.contains("onboarding-vm stay")).count()
    };
    for signal in
        [nix::sys::signal::Signal::SIGINT, nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGKILL]
    {
        let mut command = Command::new(std::env::current_exe().unwrap());
        // A lab within the lab, in a place where its directory can be watched.
        command.arg("stay").env("TMPDIR", lab.directory());
        let nested = Process::start("nested", command, None).unwrap();
        nested.wait_for_line(Duration::from_secs(10), |line| line == "staying").unwrap();
        // A shell that is about to be it has another name.
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while leftovers() != 2 {
            assert!(std::time::Instant::now() < deadline, "the lab should be up");
        }
        nested.signal(signal).unwrap();
        nested.wait(Duration::from_secs(5)).unwrap();
        let directories = || {
            let left = std::fs::read_dir(lab.directory()).unwrap().flatten();
            left.filter(|entry| entry.file_name().to_string_lossy().starts_with("onboarding-lab-")).count()
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while leftovers() > 0 || directories() > 0 {
            assert!(std::time::Instant::now() < deadline, "processes or a directory outlived {signal}");
        }
    }
}
