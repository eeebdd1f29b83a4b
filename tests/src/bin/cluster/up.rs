//! `up`: the cluster, for as long as its process lives, and who answers the other verbs.

use crate::ask::{Answer, Question, Vm as Wanted};
use crate::state::{State, VARIABLE};
use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use onboarding_testkit::netns::{self, Lab};
use onboarding_tests::forward::Forward;
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{Setup, World, http_status};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Of VMs: `10.99.0.x`, from this x on; below are the machines that every world has.
const FIRST_VM: u8 = 11;
const LAST_VM: u8 = 49;
const LONGEST_QUESTION: u64 = 64 * 1024;
/// How long a VM may take until it is in, or knows why not.
const JOIN_WITHIN: Duration = Duration::from_secs(60);

/// The process that a person started: it holds the lock, and stays outside.
pub fn outside() -> anyhow::Result<ExitCode> {
    let state = State::find();
    if std::env::var_os(VARIABLE).is_none() {
        // What runs inside may be another user there, and is to find the same directory.
        let error = Command::new(std::env::current_exe()?).arg("up").env(VARIABLE, state.directory()).exec();
        return Err(error).context("starting anew");
    }
    let _lock = state.claim()?;
    // A socket stays in the network in which it was made: through this one the API server is reached from outside.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening for kubectl")?;
    nix::unistd::dup2_stdin(&listener)?;
    drop(listener);
    let ended = netns::inside(|_| ExitCode::FAILURE);
    state.clear()?;
    Ok(ended?)
}

/// What runs in namespaces of its own.
pub fn inside() -> ExitCode {
    let ran = netns::inside(|lab| match run(lab) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dev/cluster: {error:#}");
            ExitCode::FAILURE
        }
    });
    ran.unwrap_or_else(|unavailable| {
        eprintln!("dev/cluster: {unavailable}");
        ExitCode::FAILURE
    })
}

fn run(lab: &Lab) -> anyhow::Result<()> {
    let state = State::find();
    let started = Instant::now();
    let tell = |what: &str| println!("{:>5.1} s  {what}", started.elapsed().as_secs_f64());
    tell("etcd, kube-apiserver, kube-controller-manager and istiod start ...");
    let world = World::start(lab, Setup { installed: true, ..Setup::default() })?;
    let outside: TcpListener = std::io::stdin().as_fd().try_clone_to_owned()?.into();
    let api = world.installed()?.cluster.api_address();
    let forward = Forward::start(outside, move || Some(api)).context("serving kubectl")?;
    std::fs::write(state.kubeconfig(), kubeconfig(&world, &forward)?)?;
    tell("the API server and istiod are ready; helm installs the operator ...");
    world.installed()?.install()?;
    tell("the operator runs; the ControlPlane enables onboarding, the Secret has its certificate ...");
    world.enable()?;
    tell("vmgateway, onboarding-plane and onboarding-repository are available");
    let socket = UnixListener::bind(state.socket()).context("listening for the other verbs")?;
    ready(&state, &world);
    let mut cluster = Up { world, vms: BTreeMap::new() };
    for client in socket.incoming() {
        if let Err(error) = client.map_err(Into::into).and_then(|client| cluster.serve(client)) {
            eprintln!("dev/cluster: a question wasn't answered: {error:#}");
        }
    }
    Ok(())
}

fn kubeconfig(world: &World, forward: &Forward) -> anyhow::Result<String> {
    let cluster = &world.installed()?.cluster;
    let own = std::fs::read_to_string(cluster.kubeconfig())?;
    let token =
        own.split("token: '").nth(1).and_then(|rest| rest.split('\'').next()).context("the administrator's token")?;
    Ok(format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: onboarding\n\
         contexts: [{{name: onboarding, context: {{cluster: onboarding, user: admin}}}}]\n\
         clusters: [{{name: onboarding, cluster: {{server: 'https://{}', tls-server-name: kubernetes, certificate-authority-data: {}}}}}]\n\
         users: [{{name: admin, user: {{token: '{token}'}}}}]\n",
        forward.address(),
        STANDARD.encode(cluster.ca()),
    ))
}

fn ready(state: &State, world: &World) {
    println!(
        "
Ready. In another terminal:

  export KUBECONFIG={kubeconfig}      # or: dev/cluster shell; kubectl is also `dev/cluster kubectl`

  dev/cluster kubectl get pods -A
  dev/cluster kubectl apply -f demo/manifests/ratings.yaml -f demo/manifests/productpage.yaml
  dev/cluster vm vm1                             # an EC2 instance joins the group ratings
  dev/cluster vm vm2 --group productpage         # a host on premises, with a JWT, joins productpage
  dev/cluster enter vm2 curl -sH 'Host: ratings.bookinfo:8080' http://127.0.0.2:8080/
  dev/cluster kubectl get war -A
  dev/cluster onboardctl doctor
  dev/cluster logs                               # where they are; `dev/cluster logs NAME` prints one

There is no kubelet here: what would be pods are processes, each in a network namespace with the pod's address and its ServiceAccount's
token, so `kubectl logs` and `kubectl exec` don't work (`dev/cluster logs`, `dev/cluster enter` do), and NetworkPolicies, limits and the
pods' users aren't enforced. EC2 and the JWT issuer are emulated ({clouds}); everything else is real.

Ctrl-C, or `dev/cluster down`, ends it all.",
        kubeconfig = state.kubeconfig().display(),
        clouds = world.cloud.address(),
    );
}

struct Up {
    world: World,
    vms: BTreeMap<String, Vm>,
}

impl Up {
    /// One question, one line; answers, a line each.
    fn serve(&mut self, client: UnixStream) -> anyhow::Result<()> {
        let mut line = String::new();
        BufReader::new(client.try_clone()?.take(LONGEST_QUESTION)).read_line(&mut line)?;
        let mut out = client;
        let mut say =
            |answer: &Answer| -> anyhow::Result<()> { Ok(writeln!(out, "{}", serde_json::to_string(answer)?)?) };
        let answered = match serde_json::from_str(&line)? {
            Question::Status => self.status(),
            Question::Vm(wanted) => self.vm(&wanted, &mut |text| say(&Answer::Progress(text))),
            Question::Remove { name, now } => self.remove(&name, now),
        };
        say(&answered.unwrap_or_else(|error| Answer::Failed(format!("{error:#}"))))
    }

    fn status(&self) -> anyhow::Result<Answer> {
        let installed = self.world.installed()?;
        let mut status = crate::ask::Status::default();
        for pod in installed.node().pods() {
            let ready = if pod.ready { "ready" } else { "not ready" };
            status.pods.push(format!(
                "{:<20} {:<45} {:<14} {ready}, restarted {} times",
                pod.namespace,
                pod.name,
                pod.address.to_string(),
                pod.restarts
            ));
            status.machines.insert(pod.name.clone(), pod.holder);
            if let Some(directory) = pod.log.parent() {
                status.directories.insert(pod.name.clone(), directory.to_owned());
            }
            status.logs.insert(pod.name, pod.log);
        }
        for vm in self.vms.values() {
            let connected = self.world.connected(&vm.registration());
            let how = connected.map_or_else(|error| format!("{error:#}"), |()| "AgentConnected".to_owned());
            status.vms.push(format!(
                "{:<12} {:<14} {}: {how}",
                vm.name(),
                vm.machine.address().to_string(),
                vm.registration()
            ));
            status.machines.insert(vm.name().to_owned(), vm.machine.holder_pid());
            status.directories.insert(vm.name().to_owned(), vm.machine.directory().to_owned());
            status.logs.insert(vm.name().to_owned(), vm.file("agent.log"));
        }
        status.machines.insert("control".to_owned(), installed.control.holder_pid());
        status.machines.insert("terminal".to_owned(), self.world.plane_machine.holder_pid());
        status.machines.insert("cloud".to_owned(), self.world.cloud.holder_pid());
        for (name, file) in [
            ("etcd", "etcd.log"),
            ("kube-apiserver", "kube-apiserver.log"),
            ("kube-controller-manager", "controllers.log"),
            ("istiod", "istiod.log"),
        ] {
            status.logs.insert(name.to_owned(), installed.cluster.directory().join(file));
        }
        status.logs.insert("node".to_owned(), self.world.lab().directory().join("node.log"));
        status.kubeconfig = installed.cluster.kubeconfig();
        status.ca = self.world.ca_file();
        Ok(Answer::Status(Box::new(status)))
    }

    fn vm(&mut self, wanted: &Wanted, say: &mut dyn FnMut(String) -> anyhow::Result<()>) -> anyhow::Result<Answer> {
        let Wanted { name, group, role, subject, jwt } = wanted;
        ensure!(!self.vms.contains_key(name), "there is a VM {name} already: `dev/cluster rm {name}`");
        let taken = |host: u8| self.vms.values().any(|vm| vm.machine.address().octets()[3] == host);
        let host = (FIRST_VM..=LAST_VM).find(|host| !taken(*host)).context("no address is free for a VM")?;
        let evidence = if *jwt || group == "productpage" {
            Evidence::jwt(subject.as_deref().unwrap_or(name))
        } else {
            Evidence::ec2(&format!("i-{host:017x}"), role)
        };
        let mut vm = self.world.vm(name, host, group, evidence)?;
        let started = Instant::now();
        vm.start_agent()?;
        say(format!(
            "{name} ({}) is up: its agent proves who it is, and asks to join bookinfo/{group} ...",
            vm.machine.address()
        ))?;
        let came = until(&format!("{name} joins"), JOIN_WITHIN, || {
            let agent = vm.agent()?;
            if let Some(status) = agent.status() {
                return Ok(Err(anyhow::anyhow!("the agent ended ({status}):\n{}", agent.tail())));
            }
            if let Some(line) = agent.lines_since(Default::default()).into_iter().find(|line| refused(line)) {
                return Ok(Ok(format!("It isn't admitted, and goes on asking. Its log says:\n  {line}")));
            }
            let (status, body) = http_status(&vm.machine, "http://localhost:15000/ready")?;
            ensure!(status == 200 && body.trim() == "LIVE", "{status} {body}");
            Ok(Ok(format!(
                "{} joined, {} ms after; its sidecar is LIVE.",
                vm.registration(),
                started.elapsed().as_millis()
            )))
        });
        // It stays in any case, to be looked at.
        self.vms.insert(name.clone(), vm);
        Ok(Answer::Done(came??))
    }

    fn remove(&mut self, name: &str, now: bool) -> anyhow::Result<Answer> {
        let known = || self.vms.keys().cloned().collect::<Vec<_>>().join(", ");
        ensure!(self.vms.contains_key(name), "there is no VM {name}; there are: {}", known());
        let Some(mut vm) = self.vms.remove(name) else { return Ok(Answer::Done(String::new())) };
        if now || vm.agent()?.status().is_some() {
            return Ok(Answer::Done(format!(
                "{name} is gone; its registration stays for the grace period (5 minutes)."
            )));
        }
        let took = vm.stop_agent()?;
        Ok(Answer::Done(format!("{name} left the mesh and is gone, {} ms after.", took.as_millis())))
    }
}

/// A line of an agent's log that says that it isn't let in.
fn refused(line: &str) -> bool {
    line.contains(" WARN ") && (line.contains("why=") || line.contains("Not authorized"))
}
