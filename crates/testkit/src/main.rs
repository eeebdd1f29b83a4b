//! The servers of this crate as one program, to be run inside machines. Each prints a line `listening on ADDRESS` when it is up.
#![allow(clippy::print_stdout, reason = "what it prints is what it is for")]

use anyhow::Context;
use clap::Parser;
use onboarding_testkit::application::{self, Load};
use onboarding_testkit::{ecs, imds, oidc, sts};
use serde::de::DeserializeOwned;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Servers for tests and the demo.
#[derive(Parser)]
#[command(name = "onboarding-testkit")]
enum Command {
    /// The metadata service of one EC2 instance
    Imds {
        #[arg(long, default_value = "169.254.169.254:80")]
        listen: SocketAddr,
        /// JSON of imds::Config
        #[arg(long)]
        config: PathBuf,
    },
    /// What ECS puts beside one task
    Ecs {
        #[arg(long, default_value = ecs::ADDRESS)]
        listen: SocketAddr,
        /// JSON of ecs::Config
        #[arg(long)]
        config: PathBuf,
    },
    /// A Security Token Service, in plain HTTP
    Sts {
        #[arg(long)]
        listen: SocketAddr,
        /// JSON of sts::Cloud
        #[arg(long)]
        config: PathBuf,
    },
    /// An OpenID Connect issuer
    Oidc {
        #[arg(long, default_value = "0.0.0.0:443")]
        listen: SocketAddr,
        /// JSON of oidc::Config
        #[arg(long)]
        config: PathBuf,
    },
    /// An HTTP application that says who called it
    Application {
        #[arg(long)]
        name: String,
        #[arg(long, default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
    },
    /// A TCP server that sends back what comes
    Echo {
        #[arg(long, default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
    },
    /// Calls an application until standard input ends; then prints what became of the calls, as JSON
    Client {
        #[arg(long, default_value = "127.0.0.2:8080")]
        connect_to: SocketAddr,
        /// The `host` header
        #[arg(long)]
        host: String,
        #[arg(long, default_value = "/")]
        path: String,
        #[arg(long, default_value_t = 100)]
        per_second: u32,
        #[arg(long, default_value_t = 5000)]
        timeout_ms: u64,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Imds { listen, config } => imds::serve(listening(listen).await?, read(&config)?).await,
        Command::Ecs { listen, config } => ecs::serve(listening(listen).await?, read(&config)?).await,
        Command::Sts { listen, config } => sts::serve(listening(listen).await?, read(&config)?).await,
        Command::Oidc { listen, config } => oidc::serve(listening(listen).await?, read(&config)?).await,
        Command::Application { name, listen } => application::serve(listening(listen).await?, name).await,
        Command::Echo { listen } => application::serve_echo(listening(listen).await?).await,
        Command::Client { connect_to, host, path, per_second, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms);
            let outcome = application::call(Load { connect_to, host, path, per_second, timeout }, until_told()).await;
            println!("{}", serde_json::to_string(&outcome)?);
            Ok(())
        }
    }
}

fn read<T: DeserializeOwned>(file: &Path) -> anyhow::Result<T> {
    let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))
}

async fn listening(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?;
    println!("listening on {}", listener.local_addr()?);
    Ok(listener)
}

/// Becomes true when standard input ends.
fn until_told() -> watch::Receiver<bool> {
    let (stop, stopped) = watch::channel(false);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = stop.send(true);
    });
    stopped
}
