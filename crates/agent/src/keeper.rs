//! Owns the sidecar: carries out what is asked of it in order, and starts it again where starting failed.
//!
//! Apart from the driver's loop, so that a drain of seconds doesn't hold the session up.

use crate::boot::HeldBoot;
use crate::sidecar::{Event, Identity, Options, Sidecar};
use onboarding_runtime::backoff::Backoff;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// What is asked of the keeper.
pub enum Command {
    /// Or apply, where it runs.
    Start {
        boot: Arc<HeldBoot>,
        /// Of the standalone mesh only.
        identity: Option<Identity>,
    },
    Apply(Arc<HeldBoot>),
    Rotate(Identity),
    /// Drain, then stop; [`News::Gone`] follows in any case.
    Stop,
}

/// What the keeper says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    Sidecar(Event),
    /// It can't be started, or was given something that can't be written; tried again.
    Failed {
        why: String,
        retry_in: Duration,
    },
    Gone,
}

/// Requests in flight may take this long to end.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(5);
/// From SIGTERM to SIGKILL.
pub const STOP_WITHIN: Duration = Duration::from_secs(3);

/// Serves until the commands end; then the sidecar is killed.
pub async fn keep(options: Options, mut commands: mpsc::UnboundedReceiver<Command>, news: mpsc::Sender<News>) {
    let mut wanted: Option<Wanted> = None;
    let mut running: Option<(Sidecar, mpsc::Receiver<Event>)> = None;
    let mut retry_at: Option<Instant> = None;
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        let happened = tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(command) => Happened::Command(command),
                None => return,
            },
            event = next_event(&mut running) => Happened::Event(event),
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => Happened::Retry,
        };
        let failed = match happened {
            Happened::Event(event) => {
                if news.send(News::Sidecar(event)).await.is_err() {
                    return;
                }
                None
            }
            Happened::Command(Command::Start { boot, identity }) => {
                wanted = Some((boot, identity));
                bring_up(&options, &wanted, &mut running).await
            }
            Happened::Retry => bring_up(&options, &wanted, &mut running).await,
            Happened::Command(Command::Apply(boot)) => {
                if let Some((wanted, _)) = &mut wanted {
                    *wanted = boot;
                }
                bring_up(&options, &wanted, &mut running).await
            }
            Happened::Command(Command::Rotate(identity)) => {
                if let Some((_, wanted)) = &mut wanted {
                    *wanted = Some(identity.clone());
                }
                match &running {
                    Some((sidecar, _)) => {
                        sidecar.rotate(identity).await;
                        None
                    }
                    None => bring_up(&options, &wanted, &mut running).await,
                }
            }
            Happened::Command(Command::Stop) => {
                wanted = None;
                if let Some((sidecar, _)) = running.take() {
                    sidecar.drain(DRAIN_WITHIN).await;
                    sidecar.stop(STOP_WITHIN).await;
                }
                if news.send(News::Gone).await.is_err() {
                    return;
                }
                None
            }
        };
        retry_at = match failed {
            Some(error) => {
                let retry_in = backoff.next_delay();
                let why = format!("{error:#}");
                if news.send(News::Failed { why, retry_in }).await.is_err() {
                    return;
                }
                Some(Instant::now() + retry_in)
            }
            None if running.is_some() || wanted.is_none() => {
                backoff.reset();
                None
            }
            None => retry_at,
        };
    }
}

enum Happened {
    Command(Command),
    Event(Event),
    Retry,
}

type Wanted = (Arc<HeldBoot>, Option<Identity>);

/// Hands a running sidecar what is wanted, or starts one. One of another mesh leaves first.
async fn bring_up(
    options: &Options,
    wanted: &Option<Wanted>,
    running: &mut Option<(Sidecar, mpsc::Receiver<Event>)>,
) -> Option<anyhow::Error> {
    let (boot, identity) = wanted.as_ref()?;
    if let Some((sidecar, _)) = &running
        && sidecar.suits(boot)
    {
        return sidecar.apply(boot).await.err();
    }
    if let Some((sidecar, _)) = running.take() {
        sidecar.drain(DRAIN_WITHIN).await;
        sidecar.stop(STOP_WITHIN).await;
    }
    let (sender, receiver) = mpsc::channel(64);
    match Sidecar::start(options.clone(), boot, identity.clone(), sender).await {
        Ok(sidecar) => {
            *running = Some((sidecar, receiver));
            None
        }
        Err(error) => Some(error),
    }
}

/// Never, where nothing runs.
async fn next_event(running: &mut Option<(Sidecar, mpsc::Receiver<Event>)>) -> Event {
    if let Some((_, events)) = running
        && let Some(event) = events.recv().await
    {
        return event;
    }
    std::future::pending().await
}
