//! Many agents in this process, which come in through the gateway, come back when they are cut off, and are never ready to serve.

use crate::agent::{self, Agent, Key};
use anyhow::{Context, ensure};
use onboarding_testkit::oidc::{self, Oidc};
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, World};
use onboarding_wire::onboarding as pb;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// Handshakes at the same time: this process shares its processors with the planes.
const AT_ONCE: usize = 32;
/// Those that join at a time while it keeps growing.
const GROWING: usize = 4;
const LONGEST_PAUSE_MS: u64 = 400;
/// Of its tokens and the issuer's.
const LIFE: i64 = 3600;

/// Hosts of an issuer of their own, all of the group `ratings`. Dropping it ends them without a word.
pub struct Crowd {
    members: Vec<Member>,
    shared: Arc<Shared>,
    runtime: Runtime,
}

struct Shared {
    name: String,
    issuer: Oidc,
    tls: Arc<rustls::ClientConfig>,
    way_in: SocketAddr,
    turns: Semaphore,
    /// Who has one of these is one of those that join next.
    next: Semaphore,
    drains: Mutex<Option<i64>>,
}

struct Member {
    host: Host,
    /// While it isn't away.
    task: Option<JoinHandle<()>>,
}

/// What survives its absence.
#[derive(Clone)]
struct Host {
    number: u32,
    key: Key,
    token: Arc<Mutex<String>>,
    seen: Arc<Seen>,
}

/// Of a [`Crowd::race`].
pub struct Racer {
    /// Of its key.
    pub thumbprint: String,
    pub outcome: Result<agent::Session, Status>,
}

/// What became of its tries.
#[derive(Default)]
struct Seen {
    connected: AtomicBool,
    /// A session.
    opened: Notify,
    sessions: AtomicUsize,
    refusals: Mutex<Vec<String>>,
}

impl Crowd {
    /// The issuer is made known to the plane, and a policy admits its hosts.
    pub fn new(world: &World, name: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let issuer = runtime.block_on(oidc::start())?;
        let plane = world.manifest("controlplane.yaml")?;
        let list = "            issuers:\n";
        let ours = format!(
            "{list}            - issuer: {}\n              shortName: {name}\n              jwks: '{}'\n",
            issuer.issuer,
            issuer.jwks()
        );
        ensure!(plane.contains(list), "{plane}");
        world.write_manifest("controlplane.yaml", &plane.replacen(list, &ours, 1))?;
        world.write_manifest(&format!("{name}.yaml"), &policy(name, &issuer.issuer))?;
        let shared = Shared {
            name: name.to_owned(),
            issuer,
            tls: agent::client_config(world.ca_certificate(), rustls::ALL_VERSIONS),
            way_in: (world.way_in(), 15443).into(),
            turns: Semaphore::new(AT_ONCE),
            next: Semaphore::new(GROWING),
            drains: Mutex::default(),
        };
        Ok(Self { members: Vec::new(), shared: Arc::new(shared), runtime })
    }

    /// These planes know the issuer and the policy.
    pub fn wait_admitted(&self, planes: &[SocketAddr]) -> anyhow::Result<()> {
        let admitted = async |plane| {
            let mut agent = agent::dial(plane, ENDPOINT, self.shared.tls.clone(), Key::new()).await?;
            let discovered = agent.try_discover().await?;
            // A host that never registers.
            self.shared.authorize(9999, &mut agent, &discovered).await?;
            anyhow::Ok(())
        };
        for plane in planes {
            let what = format!("{plane} admits {}", self.shared.name);
            until(&what, Duration::from_secs(30), || self.runtime.block_on(admitted(*plane)))?;
        }
        Ok(())
    }

    /// So many more of them begin to join.
    pub fn grow(&mut self, by: u32) {
        self.add(by);
        self.come_back();
    }

    /// A few at a time join, each with this pause after one before is there, until it is [enough](Self::enough).
    pub fn keep_growing(&mut self, at_most: u32, pause: Duration) {
        self.add(at_most);
        self.begin(move |shared, host| async move {
            // Closed: that was enough.
            let Ok(turn) = shared.next.acquire().await else { return };
            tokio::time::sleep(pause).await;
            let mut living = pin!(shared.live(&host));
            tokio::select! {
                () = &mut living => {}
                () = host.seen.opened.notified() => {}
            }
            drop(turn);
            living.await;
        });
    }

    /// Nobody else begins to join. How many there are, when the last one has its session.
    pub fn enough(&mut self, within: Duration) -> anyhow::Result<usize> {
        self.shared.next.close();
        let is_out = |member: &Member| member.task.as_ref().is_some_and(JoinHandle::is_finished);
        until("the last one has joined", within, || {
            let there = |member: &Member| is_out(member) || member.host.seen.connected.load(Ordering::SeqCst);
            let waiting = self.members.iter().filter(|member| !there(member)).count();
            ensure!(waiting == 0, "{waiting} have no session");
            Ok(())
        })?;
        self.members.retain(|member| !is_out(member));
        Ok(self.members.len())
    }

    fn add(&mut self, by: u32) {
        let first = self.members.len() as u32;
        for number in first..first + by {
            let (token, seen) = Default::default();
            self.members.push(Member { host: Host { number, key: Key::new(), token, seen }, task: None });
        }
    }

    /// Whoever is away comes back, with the key and the token that it had.
    pub fn come_back(&mut self) {
        self.begin(|shared, host| async move { shared.live(&host).await });
    }

    /// What each does that is away.
    fn begin<F: Future<Output = ()> + Send + 'static>(&mut self, what: impl Fn(Arc<Shared>, Host) -> F) {
        for member in self.members.iter_mut().filter(|member| member.task.is_none()) {
            member.task = Some(self.runtime.spawn(what(self.shared.clone(), member.host.clone())));
        }
    }

    /// Those that `which` names end where they are, as on a machine that loses its power and whose connections are reset.
    pub fn vanish(&mut self, which: impl Fn(&str) -> bool) {
        for member in self.members.iter_mut().filter(|member| which(&self.shared.registration(member.host.number))) {
            if let Some(task) = member.task.take() {
                task.abort();
                // The connection is closed when the task is gone.
                let _ = self.runtime.block_on(task);
            }
            member.host.seen.connected.store(false, Ordering::SeqCst);
        }
    }

    /// All of them go, and nothing is left of them: nobody admits them any more.
    pub fn leave(mut self, world: &World) -> anyhow::Result<()> {
        self.vanish(|_| true);
        world.remove_manifest(&format!("{}.yaml", self.shared.name))?;
        until("nothing is left of the crowd", Duration::from_secs(240), || {
            let (wars, entries) = (self.wars(world)?.len(), self.entries(world)?.len());
            ensure!((wars, entries) == (0, 0), "{wars} wars and {entries} entries");
            Ok(())
        })
    }

    /// Of the war of the member with this number.
    pub fn name(&self, number: u32) -> String {
        self.shared.registration(number)
    }

    /// Every member that isn't away has a session.
    pub fn wait_connected(&self, within: Duration) -> anyhow::Result<()> {
        until("the crowd is connected", within, || {
            let waiting: Vec<_> =
                self.there().filter(|member| !member.host.seen.connected.load(Ordering::SeqCst)).collect();
            let Some(first) = waiting.first() else { return Ok(()) };
            anyhow::bail!("{} are not; one of them last heard {:?}", waiting.len(), first.host.seen.last_refusal())
        })
    }

    /// Two hosts that both say to be the member with this number, who isn't here, with a key each: both are authorized, each by its own
    /// plane, and then register at the same moment. Who is let in opens its session.
    pub fn race(&self, number: u32, planes: [SocketAddr; 2]) -> anyhow::Result<[Racer; 2]> {
        let keys = [Key::new(), Key::new()];
        let start = tokio::sync::Barrier::new(planes.len());
        let run = |turn: usize| {
            let (plane, key, start, shared) = (planes[turn], keys[turn].clone(), &start, &self.shared);
            async move {
                let mut agent = agent::dial(plane, ENDPOINT, shared.tls.clone(), key).await?;
                let discovered = agent.try_discover().await?;
                shared.authorize(number, &mut agent, &discovered).await?;
                start.wait().await;
                anyhow::Ok(match shared.register_at_its_address(number, &agent).await {
                    Ok(()) => Ok(agent.session().await?),
                    Err(refused) => Err(refused),
                })
            }
        };
        let both = async { tokio::join!(run(0), run(1)) };
        let both = self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), both).await })?;
        let [first, second] = &keys;
        Ok([
            Racer { thumbprint: first.thumbprint(), outcome: both.0? },
            Racer { thumbprint: second.thumbprint(), outcome: both.1? },
        ])
    }

    /// What a newcomer is told before it has said anything.
    pub fn discover(&self) -> anyhow::Result<pb::DiscoverResponse> {
        self.runtime.block_on(async {
            let agent = agent::dial(self.shared.way_in, ENDPOINT, self.shared.tls.clone(), Key::new()).await?;
            Ok(agent.try_discover().await?)
        })
    }

    /// How many have a session now.
    pub fn connected(&self) -> usize {
        self.there().filter(|member| member.host.seen.connected.load(Ordering::SeqCst)).count()
    }

    /// Every member that isn't away has a session now.
    pub fn is_connected(&self) -> anyhow::Result<()> {
        let (there, connected) = (self.there().count(), self.connected());
        ensure!(there == connected, "{connected} of {there} are");
        Ok(())
    }

    /// How many seconds a sidecar drains by the boot configuration that was last given to one that joined.
    pub fn drains(&self) -> Option<i64> {
        *self.shared.drains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sessions that were opened, of all members and since ever.
    pub fn sessions(&self) -> usize {
        self.members.iter().map(|member| member.host.seen.sessions.load(Ordering::SeqCst)).sum()
    }

    /// What the plane refused, and to how many tries.
    pub fn refusals(&self) -> BTreeMap<String, usize> {
        let mut all = BTreeMap::new();
        for member in &self.members {
            for refusal in member.host.seen.lock().iter() {
                *all.entry(refusal.clone()).or_default() += 1;
            }
        }
        all
    }

    fn there(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.task.is_some())
    }

    /// Its wars, by name.
    pub fn wars(&self, world: &World) -> anyhow::Result<BTreeMap<String, Value>> {
        self.objects(world, "war")
    }
    /// Its WorkloadEntries, by name.
    pub fn entries(&self, world: &World) -> anyhow::Result<BTreeMap<String, Value>> {
        self.objects(world, "workloadentry")
    }

    fn objects(&self, world: &World, kind: &str) -> anyhow::Result<BTreeMap<String, Value>> {
        let text = world.mesh()?.cluster.kubectl(["get", kind, "-n", "bookinfo", "-o", "json"])?;
        let mut list: Value = serde_json::from_str(&text)?;
        let items = list["items"].as_array_mut().context("a list has items")?;
        let prefix = format!("ratings-jwt-{}--", self.shared.name);
        let named = std::mem::take(items).into_iter().filter_map(|item| {
            let name = item["metadata"]["name"].as_str()?.to_owned();
            name.starts_with(&prefix).then_some((name, item))
        });
        Ok(named.collect())
    }
}

impl Seen {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn last_refusal(&self) -> Option<String> {
        self.lock().last().cloned()
    }
}

impl Shared {
    fn registration(&self, number: u32) -> String {
        format!("ratings-jwt-{0}--{0}-{number:04}", self.name)
    }

    /// As the agent does: a session, and another when it ends.
    async fn live(&self, host: &Host) {
        let Host { token, seen, .. } = host;
        loop {
            if let Err(status) = self.session(host).await {
                // Who has no registration, or a token that isn't taken, begins from the start.
                if matches!(status.code(), Code::NotFound | Code::Unauthenticated | Code::PermissionDenied) {
                    token.lock().unwrap().clear();
                }
                seen.lock().push(format!("{:?}: {}", status.code(), status.message()));
            }
            seen.connected.store(false, Ordering::SeqCst);
            let pause = rand::random_range(LONGEST_PAUSE_MS / 4..LONGEST_PAUSE_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn session(&self, host: &Host) -> Result<(), Status> {
        let mut session = {
            let _turn = self.turns.acquire().await;
            let open = self.open(host);
            let opened = tokio::time::timeout(Duration::from_secs(20), open).await;
            opened.map_err(|_| Status::deadline_exceeded("no session within 20 s"))??
        };
        // The first boot configuration shows that the plane has it.
        if let Some(pb::PlaneMessage { message: Some(pb::plane_message::Message::Boot(boot)) }) =
            session.hear.message().await?
            && let Some(pb::boot_configuration::Sidecar::Istio(istio)) = boot.sidecar
        {
            *self.drains.lock().unwrap_or_else(PoisonError::into_inner) = istio.drain_duration.map(|it| it.seconds);
        }
        host.seen.sessions.fetch_add(1, Ordering::SeqCst);
        host.seen.connected.store(true, Ordering::SeqCst);
        host.seen.opened.notify_one();
        while session.hear.message().await?.is_some() {}
        Ok(())
    }

    async fn open(&self, host: &Host) -> Result<agent::Session, Status> {
        let Host { number, key, token, .. } = host;
        let unreachable = |error: tonic::transport::Error| Status::unavailable(format!("nobody there: {error}"));
        let mut agent = agent::dial(self.way_in, ENDPOINT, self.tls.clone(), key.clone()).await.map_err(unreachable)?;
        let discovered = agent.try_discover().await?;
        agent.token = token.lock().unwrap().clone();
        if !agent.token.is_empty() {
            let proof = agent.token_proof_after(&discovered);
            return agent.session_with(Some(proof)).await;
        }
        self.authorize(*number, &mut agent, &discovered).await?;
        self.register_at_its_address(*number, &agent).await?;
        *token.lock().unwrap() = agent.token.clone();
        agent.session().await
    }

    async fn authorize(&self, number: u32, agent: &mut Agent, discovered: &pb::DiscoverResponse) -> Result<(), Status> {
        let now = jiff::Timestamp::now().as_second();
        let claims = serde_json::json!({
            "sub": format!("{}-{number:04}", self.name), "aud": discovered.plane_uid, "iat": now, "exp": now + LIFE,
        });
        let jwt = self.issuer.mint(jsonwebtoken::Algorithm::ES256, claims).unwrap();
        agent.token = agent.authorize_with(agent.request_after(discovered, &jwt)).await?.token;
        Ok(())
    }

    async fn register_at_its_address(&self, number: u32, agent: &Agent) -> Result<(), Status> {
        let [_, _, high, low] = number.to_be_bytes();
        agent.register_at(&Ipv4Addr::new(10, 200, high, low).to_string(), None).await.map(drop)
    }
}

/// The policy that admits the hosts of this issuer to the group.
pub fn policy(name: &str, issuer: &str) -> String {
    format!(
        "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
         spec:\n  allow:\n  - workloads: [{{jwt: {{issuer: '{issuer}'}}}}]\n    onboardTo: [{{workloadGroupSelector: {{matchLabels: {{app: ratings}}}}}}]\n"
    )
}
