//! The node of a cluster that has none: what its controllers make pods of runs as processes, each on a machine of its own.
//!
//! In place of a scheduler, a kubelet and a cloud's load balancer, as far as onboarding's own pods need them: a pod is bound, its program
//! started with the arguments of its container and the token of its ServiceAccount where a pod finds it, its readiness probe asked, its
//! status written; a pod that is deleted is told so by SIGTERM, and one whose process ends gets another. There are no images: an image's
//! name says which program of this workspace is meant, `auto` the gateway that Istio's injection would put there.

use crate::forward::Forward;
use crate::world::{binary, envoy};
use anyhow::{Context, bail, ensure};
use jiff::Timestamp;
use nix::sys::signal::Signal;
use onboarding_testkit::cluster::{Cluster, Istiod};
use onboarding_testkit::gateway;
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process::{self, Process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const NAME: &str = "lab";
/// The address of the load balancer, on the lab's bridge.
const BALANCER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 6);
const BRIDGE: &str = "lab";
/// Of pods: `10.99.0.x`, from this x on.
const FIRST_HOST: u8 = 100;
const LAST_HOST: u8 = 250;
const TICK: Duration = Duration::from_millis(50);
const PROBE_UNREADY: Duration = Duration::from_millis(150);
/// As kubelet has it, unless it is told otherwise (`failureThreshold`).
const MISSES: u32 = 3;
const PROBE_READY: Duration = Duration::from_secs(2);
/// What a watch missed, the next one doesn't.
const WATCH: Duration = Duration::from_secs(20);
/// Of kubectl, which gives up by itself before that.
const ANSWERED: Duration = Duration::from_secs(20);
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Where every pod finds its account.
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";
const GATEWAY: &str = "vmgateway";

/// What a node is started with.
pub struct Options {
    pub lab: Lab,
    pub cluster: Arc<Cluster>,
    pub istiod: Istiod,
    /// Names that pods can resolve.
    pub hosts: Vec<(Ipv4Addr, String)>,
    /// Flags of `onboarding-plane` beside those of its Deployment: the clouds of a lab aren't the real ones.
    pub plane_flags: Vec<String>,
}

/// Runs pods until it is dropped.
pub struct Node {
    stop: Arc<AtomicBool>,
    shown: Shown,
    doing: Arc<Mutex<(String, Instant)>>,
    balancer: Arc<Balancer>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Running {
    pub namespace: String,
    pub name: String,
    /// `onboarding-plane` and the like.
    pub program: &'static str,
    pub machine: String,
    /// The process that keeps its machine.
    pub holder: i32,
    pub address: Ipv4Addr,
    pub ready: bool,
    pub restarts: u32,
    pub log: PathBuf,
}

type Shown = Arc<Mutex<BTreeMap<String, Running>>>;

impl Node {
    pub fn start(options: Options) -> anyhow::Result<Self> {
        options.cluster.apply(&format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {NAME}}}\n"))?;
        let mut ip = Command::new("ip");
        ip.args(["addr", "add", &format!("{BALANCER}/32"), "dev", BRIDGE]);
        process::output(ip, Duration::from_secs(10))?;
        let (stop, shown, balancer) = (Arc::default(), Shown::default(), Arc::new(Balancer::default()));
        let doing = Arc::new(Mutex::new(("starts".to_owned(), Instant::now())));
        let worker = Worker {
            files: tempfile::tempdir()?,
            envoy: envoy()?,
            options,
            pods: BTreeMap::new(),
            next_host: FIRST_HOST,
            shown: Arc::clone(&shown),
            doing: Arc::clone(&doing),
            balancer: Arc::clone(&balancer),
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::Builder::new().name("node".to_owned()).spawn(move || worker.run())?;
        Ok(Self { stop, shown, doing, balancer, thread: Some(thread) })
    }

    /// Where `vmgateway` is reached from outside, as `.status.loadBalancer` of its Service says.
    pub fn way_in(&self) -> Ipv4Addr {
        BALANCER
    }

    /// What it is at, and since when: for an error message.
    pub fn doing(&self) -> String {
        let doing = lock(&self.doing);
        format!("{}, for {:?}", doing.0, doing.1.elapsed())
    }

    pub fn pods(&self) -> Vec<Running> {
        lock(&self.shown).values().cloned().collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        lock(&self.balancer.ports).clear();
    }
}

/// Of Service `vmgateway`.
#[derive(Default)]
struct Balancer {
    /// Gateways that are ready.
    gateways: Arc<Mutex<Vec<Ipv4Addr>>>,
    ports: Mutex<BTreeMap<u16, Forward>>,
}

impl Balancer {
    /// `service`: the object.
    fn serve(&self, service: &Value) -> anyhow::Result<()> {
        let mut ports = lock(&self.ports);
        for port in service["spec"]["ports"].as_array().into_iter().flatten() {
            let number = |field: &str| port[field].as_u64().and_then(|number| u16::try_from(number).ok());
            let from = number("port").context("a port of a Service has a number")?;
            let to = number("targetPort").unwrap_or(from);
            if ports.contains_key(&from) {
                continue;
            }
            let gateways = Arc::clone(&self.gateways);
            let listener = TcpListener::bind((BALANCER, from)).with_context(|| format!("listening on port {from}"))?;
            let forward = Forward::start(listener, move || {
                lock(&gateways).first().map(|gateway| SocketAddr::new(IpAddr::V4(*gateway), to))
            })?;
            ports.insert(from, forward);
        }
        Ok(())
    }
}

struct Worker {
    options: Options,
    files: tempfile::TempDir,
    envoy: PathBuf,
    pods: BTreeMap<String, Pod>,
    next_host: u8,
    shown: Shown,
    doing: Arc<Mutex<(String, Instant)>>,
    balancer: Arc<Balancer>,
    stop: Arc<AtomicBool>,
}

struct Pod {
    running: Running,
    object: Value,
    machine: Machine,
    process: Process,
    probe_at: Instant,
    /// Probes in a row without an answer.
    misses: u32,
    restart_at: Option<Instant>,
    /// To be killed then.
    terminating: Option<Instant>,
    /// What the API server was told: ready, and how often restarted.
    told: Option<(bool, u32)>,
    tell_at: Instant,
}

enum Event {
    Changed(Box<Value>),
    /// There is no watch.
    Refused(String),
    /// The watch is over.
    Ended,
}

impl Worker {
    fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(error) = self.watch() {
                self.say(&format!("pods can't be watched; it is tried again: {error:#}"));
                std::thread::park_timeout(Duration::from_millis(500));
            }
        }
    }

    /// Until the watch ends.
    fn watch(&mut self) -> anyhow::Result<()> {
        self.at("lists pods");
        let uids = self.kubectl(&["get", "pods", "-A", "-o", "jsonpath={.items[*].metadata.uid}"])?;
        let there: Vec<&str> = uids.split(' ').collect();
        self.pods.retain(|uid, _| there.contains(&uid.as_str()));
        let kubectl = self.options.cluster.binary("kubectl");
        let mut watch = Command::new(kubectl)
            .arg("--kubeconfig")
            .arg(self.options.cluster.kubeconfig())
            // From what the API server has at hand (0): to make sure that it is the newest it needs a newer etcd than this one.
            .args([
                "get",
                "--raw",
                &format!("/api/v1/pods?watch=true&resourceVersion=0&timeoutSeconds={}", WATCH.as_secs()),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting kubectl")?;
        let started = Instant::now();
        let (events, queue) = channel();
        let out = watch.stdout.take().context("the output of kubectl")?;
        std::thread::Builder::new().name("node: watch".to_owned()).spawn(move || read(out, &events))?;
        let followed = self.follow(&queue);
        self.at("ends a watch");
        let said = end(&mut watch)?;
        followed?;
        ensure!(started.elapsed() > TICK * 10 || self.stop.load(Ordering::Relaxed), "kubectl ended at once: {said}");
        Ok(())
    }

    fn follow(&mut self, queue: &Receiver<Event>) -> anyhow::Result<()> {
        // The API server ends it sooner.
        let deadline = Instant::now() + WATCH * 2;
        while !self.stop.load(Ordering::Relaxed) && Instant::now() < deadline {
            self.at("watches pods");
            match queue.recv_timeout(TICK) {
                Ok(Event::Changed(event)) => {
                    if let Err(error) = self.changed(&event) {
                        let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                        self.say(&format!("pod {name}: {error:#}"));
                    }
                }
                Ok(Event::Refused(why)) => bail!("the API server says {why}"),
                Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.tick();
        }
        Ok(())
    }

    fn changed(&mut self, event: &Value) -> anyhow::Result<()> {
        let pod = &event["object"];
        let uid = pod["metadata"]["uid"].as_str().context("a pod without a uid")?;
        if event["type"] == "DELETED" {
            self.pods.remove(uid);
            return Ok(());
        }
        if pod["metadata"]["deletionTimestamp"].is_string() {
            return match self.pods.get_mut(uid) {
                Some(pod) => pod.terminate(),
                None => self.deleted(pod),
            };
        }
        if !self.pods.contains_key(uid)
            && let Some(started) = self.start_pod(pod)?
        {
            self.pods.insert(uid.to_owned(), started);
        }
        Ok(())
    }

    /// `None` where the image is none of ours: the pod stays pending, as where an image can't be pulled.
    fn start_pod(&mut self, pod: &Value) -> anyhow::Result<Option<Pod>> {
        let image = pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
        let Some(program) = program(image) else { return Ok(None) };
        let text = |value: &Value| value.as_str().map(str::to_owned).context("a pod without a name");
        let (namespace, name) = (text(&pod["metadata"]["namespace"])?, text(&pod["metadata"]["name"])?);
        self.at(&format!("binds {name}"));
        if pod["spec"]["nodeName"].is_null() {
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "namespace": namespace},
                "target": {"apiVersion": "v1", "kind": "Node", "name": NAME},
            });
            self.raw("create", &format!("/api/v1/namespaces/{namespace}/pods/{name}/binding"), &binding)?;
        }
        self.at(&format!("makes a machine for {name}"));
        let machine = self.machine(pod, &namespace)?;
        self.at(&format!("starts {name}"));
        let process = self.process(pod, program, &machine, &name)?;
        let running = Running {
            log: log(&machine, program),
            machine: machine.name().to_owned(),
            holder: machine.holder_pid(),
            address: machine.address(),
            ready: false,
            restarts: 0,
            namespace,
            name,
            program,
        };
        let now = Instant::now();
        let object = pod.clone();
        let (restart_at, terminating, told) = (None, None, None);
        Ok(Some(Pod {
            running,
            object,
            machine,
            process,
            probe_at: now,
            misses: 0,
            restart_at,
            terminating,
            told,
            tell_at: now,
        }))
    }

    /// With the account's token where a pod has it.
    fn machine(&mut self, pod: &Value, namespace: &str) -> anyhow::Result<Machine> {
        let taken = |host: u8| self.pods.values().any(|pod| pod.machine.address().octets()[3] == host);
        let free = (self.next_host..=LAST_HOST).chain(FIRST_HOST..self.next_host).find(|host| !taken(*host));
        let host = free.context("no address is free for a pod")?;
        self.next_host = if host == LAST_HOST { FIRST_HOST } else { host + 1 };
        let machine = self.options.lab.machine(&format!("pod-{host}"), host)?;
        for (address, name) in &self.options.hosts {
            machine.add_host(*address, name)?;
        }
        if pod["spec"]["automountServiceAccountToken"] == false {
            return Ok(machine);
        }
        let account = pod["spec"]["serviceAccountName"].as_str().unwrap_or("default");
        let cluster = &self.options.cluster;
        let token = self.kubectl(&["create", "token", account, "-n", namespace, "--duration=8760h"])?;
        let files = machine.directory().join("serviceaccount");
        std::fs::create_dir_all(&files)?;
        for (file, text) in [("token", token.trim()), ("ca.crt", cluster.ca()), ("namespace", namespace)] {
            std::fs::write(files.join(file), text)?;
        }
        let script = r#"mount -t tmpfs tmpfs /run && mkdir -p "$1" && cp "$0"/* "$1""#;
        let files = files.to_str().context("a path that isn't text")?;
        machine.check("sh", ["-c", script, files, ACCOUNT])?;
        Ok(machine)
    }

    fn process(&self, pod: &Value, program: &'static str, machine: &Machine, name: &str) -> anyhow::Result<Process> {
        if program == GATEWAY {
            return gateway::start(&self.options.cluster, self.options.istiod, machine, &self.envoy, Some(name), None);
        }
        let container = &pod["spec"]["containers"][0];
        let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
        let mounts = self.mount_secrets(pod, machine, namespace)?;
        let mut command = machine.command(binary(program)?);
        for argument in container["args"].as_array().into_iter().flatten() {
            let argument = argument.as_str().context("an argument that isn't text")?;
            let mut argument = argument.replace("$(POD_NAMESPACE)", namespace).replace("$(POD_NAME)", name);
            for (path, here) in &mounts {
                argument = argument.replace(path, here);
            }
            command.arg(argument);
        }
        match program {
            "onboarding-plane" => command.args(&self.options.plane_flags),
            "onboarding-repository" => {
                let packages = machine.directory().join("packages");
                std::fs::create_dir_all(&packages)?;
                command.arg("--packages").arg(packages)
            }
            _ => &mut command,
        };
        let api = self.options.cluster.api_address();
        command.env("KUBERNETES_SERVICE_HOST", api.ip().to_string());
        command.env("KUBERNETES_SERVICE_PORT", api.port().to_string());
        Process::start(name, command, Some(&log(machine, program)))
    }

    /// Secrets as files, once; where they are mounted in a pod, and where they are here.
    fn mount_secrets(&self, pod: &Value, machine: &Machine, namespace: &str) -> anyhow::Result<Vec<(String, String)>> {
        let mut mounts = Vec::new();
        for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
            let (Some(secret), Some(name)) = (volume["secret"]["secretName"].as_str(), volume["name"].as_str()) else {
                continue;
            };
            let directory = machine.directory().join("volumes").join(name);
            std::fs::create_dir_all(&directory)?;
            for file in ["tls.crt", "tls.key"] {
                let template = format!("go-template={{{{index .data \"{file}\" | base64decode}}}}");
                let get = ["get", "secret", secret, "-n", namespace, "-o", &template];
                std::fs::write(directory.join(file), self.kubectl(&get)?)?;
            }
            let all = pod["spec"]["containers"][0]["volumeMounts"].as_array().into_iter().flatten();
            let here = directory.to_str().context("a path that isn't text")?;
            mounts.extend(
                all.filter(|mount| mount["name"] == name)
                    .filter_map(|mount| Some((mount["mountPath"].as_str()?.to_owned(), here.to_owned()))),
            );
        }
        Ok(mounts)
    }

    fn tick(&mut self) {
        let mut gone = Vec::new();
        let uids: Vec<String> = self.pods.keys().cloned().collect();
        for uid in uids {
            let Some(mut pod) = self.pods.remove(&uid) else { continue };
            self.at(&format!("looks after {}", pod.running.name));
            match self.look_after(&mut pod) {
                Ok(true) => gone.push(pod),
                Ok(false) => drop(self.pods.insert(uid, pod)),
                Err(error) => {
                    self.say(&format!("pod {}: {error:#}", pod.running.name));
                    pod.tell_at = Instant::now() + RESTART_AFTER;
                    self.pods.insert(uid, pod);
                }
            }
        }
        let running = self.pods.iter().map(|(uid, pod)| (uid.clone(), pod.running.clone()));
        *lock(&self.shown) = running.collect();
        for Pod { object, machine, process, .. } in gone {
            drop((process, machine));
            if let Err(error) = self.deleted(&object) {
                self.say(&format!("{error:#}"));
            }
        }
    }

    /// Whether it has ended, as it was told to.
    fn look_after(&self, pod: &mut Pod) -> anyhow::Result<bool> {
        let (now, ended) = (Instant::now(), pod.process.status().is_some());
        if let Some(deadline) = pod.terminating {
            return Ok(ended || now >= deadline);
        }
        if ended {
            pod.running.ready = false;
            let at = *pod.restart_at.get_or_insert(now + RESTART_AFTER);
            if now >= at {
                pod.process = self.process(&pod.object, pod.running.program, &pod.machine, &pod.running.name)?;
                pod.running.restarts += 1;
                pod.restart_at = None;
            }
        } else if now >= pod.probe_at {
            let answers = probe(&pod.object, pod.running.address);
            pod.misses = if answers { 0 } else { pod.misses + 1 };
            pod.running.ready = answers || pod.running.ready && pod.misses < MISSES;
            pod.probe_at = now + if answers { PROBE_READY } else { PROBE_UNREADY };
        }
        let is = (pod.running.ready, pod.running.restarts);
        if pod.told != Some(is) && now >= pod.tell_at {
            self.tell(pod)?;
            pod.told = Some(is);
        }
        Ok(false)
    }

    fn tell(&self, pod: &Pod) -> anyhow::Result<()> {
        let Running { namespace, name, ready, .. } = &pod.running;
        self.kubectl(&[
            "patch",
            "pod",
            name,
            "-n",
            namespace,
            "--subresource=status",
            "--type=merge",
            "-p",
            &pod.status().to_string(),
        ])?;
        if pod.running.program == GATEWAY {
            let address = pod.running.address;
            let mut gateways = lock(&self.balancer.gateways);
            gateways.retain(|one| *one != address);
            if *ready {
                gateways.insert(0, address);
            }
            drop(gateways);
            if *ready {
                self.balance(namespace)?;
            }
        }
        Ok(())
    }

    fn balance(&self, namespace: &str) -> anyhow::Result<()> {
        let service = self.kubectl(&["get", "service", GATEWAY, "-n", namespace, "-o", "json"])?;
        self.balancer.serve(&serde_json::from_str(&service)?)?;
        let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": BALANCER.to_string()}]}}}).to_string();
        let patch =
            ["patch", "service", GATEWAY, "-n", namespace, "--subresource=status", "--type=merge", "-p", &status];
        self.kubectl(&patch).map(drop)
    }

    /// Tells the API server that nothing of this pod runs any more.
    fn deleted(&self, pod: &Value) -> anyhow::Result<()> {
        let (namespace, name) = (&pod["metadata"]["namespace"], &pod["metadata"]["name"]);
        let (namespace, name) = (namespace.as_str().unwrap_or_default(), name.as_str().unwrap_or_default());
        let options = json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0,
            "preconditions": {"uid": pod["metadata"]["uid"]},
        });
        match self.raw("delete", &format!("/api/v1/namespaces/{namespace}/pods/{name}"), &options) {
            // Said before, or by a person with --force.
            Err(error) if format!("{error:#}").contains("(NotFound)") => Ok(()),
            other => other,
        }
    }

    /// With a bound: one answer that doesn't come must not keep all pods waiting.
    fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let arguments = [&["--request-timeout=15s"], arguments].concat();
        let ask = || self.options.cluster.kubectl_within(ANSWERED, &arguments);
        // A kubelet, too, asks again where there was no answer.
        ask().or_else(|error| {
            self.say(&format!("{error:#}"));
            ask()
        })
    }

    fn raw(&self, verb: &str, path: &str, body: &Value) -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(self.files.path())?;
        write!(file, "{body}")?;
        let file = file.path().to_str().context("a path that isn't text")?;
        self.kubectl(&[verb, "--raw", path, "-f", file]).map(drop)
    }

    fn at(&self, what: &str) {
        let mut doing = lock(&self.doing);
        if doing.0 != what {
            *doing = (what.to_owned(), Instant::now());
        }
    }

    fn say(&self, what: &str) {
        if !self.stop.load(Ordering::Relaxed) {
            let log = self.options.lab.directory().join("node.log");
            let file = std::fs::File::options().create(true).append(true).open(log);
            // Nobody is left to tell where that can't be written.
            let _ = file.and_then(|mut file| writeln!(file, "{} {what}", Timestamp::now()));
        }
    }
}

impl Pod {
    fn terminate(&mut self) -> anyhow::Result<()> {
        if self.terminating.is_some() {
            return Ok(());
        }
        let grace = self.object["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        self.terminating = Some(Instant::now() + Duration::from_secs(grace));
        match self.process.status() {
            None => self.process.signal(Signal::SIGTERM),
            Some(_) => Ok(()),
        }
    }

    fn status(&self) -> Value {
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let Running { address, ready, restarts, .. } = &self.running;
        let address = address.to_string();
        let condition = |kind: &str, yes: bool| json!({"type": kind, "status": if yes { "True" } else { "False" }, "lastTransitionTime": now});
        let container = &self.object["spec"]["containers"][0];
        json!({"status": {
            "phase": "Running", "startTime": now, "podIP": address, "podIPs": [{"ip": address}], "hostIP": "10.99.0.1",
            "conditions": [
                condition("PodScheduled", true), condition("Initialized", true),
                condition("ContainersReady", *ready), condition("Ready", *ready),
            ],
            "containerStatuses": [{
                "name": container["name"], "image": container["image"], "imageID": "", "ready": ready, "started": true,
                "restartCount": restarts, "state": {"running": {"startedAt": now}},
            }],
        }})
    }
}

/// Of an image's name, whatever its registry and tag.
fn program(image: &str) -> Option<&'static str> {
    let name = image.rsplit('/').next()?.split([':', '@']).next()?;
    let ours = ["onboarding-operator", "onboarding-plane", "onboarding-repository"];
    if name == "auto" { Some(GATEWAY) } else { ours.into_iter().find(|program| *program == name) }
}

fn log(machine: &Machine, program: &str) -> PathBuf {
    let name = if program == GATEWAY { "gateway" } else { program };
    machine.directory().join(format!("{name}.log"))
}

/// Whether its readiness probe is answered with a 2xx or 3xx.
fn probe(pod: &Value, address: Ipv4Addr) -> bool {
    let get = &pod["spec"]["containers"][0]["readinessProbe"]["httpGet"];
    let port = get["port"].as_u64().and_then(|port| u16::try_from(port).ok());
    let (Some(port), Some(path)) = (port, get["path"].as_str()) else { return true };
    let ask = || -> std::io::Result<String> {
        let timeout = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&(address, port).into(), timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(String::from_utf8_lossy(&head).into_owned())
    };
    ask().is_ok_and(|head| head.starts_with("HTTP/1.1 2") || head.starts_with("HTTP/1.1 3"))
}

/// One event a line.
fn read(out: impl Read, events: &Sender<Event>) {
    for line in BufReader::new(out).lines().map_while(Result::ok) {
        let event = match serde_json::from_str::<Value>(&line) {
            Ok(event) if event["type"] == "ERROR" => Event::Refused(event["object"]["message"].to_string()),
            Ok(event) => Event::Changed(Box::new(event)),
            Err(error) => Event::Refused(format!("{line:?}: {error}")),
        };
        if events.send(event).is_err() {
            break;
        }
    }
    let _ = events.send(Event::Ended);
}

/// What it said on standard error.
fn end(child: &mut Child) -> anyhow::Result<String> {
    let _ = child.kill();
    child.wait()?;
    let mut said = String::new();
    child.stderr.take().map(|stderr| stderr.take(4096).read_to_string(&mut said)).transpose()?;
    Ok(said)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
