//! The servers of this crate as one program, to be run inside machines. Each prints a line `listening on ADDRESS` when it is up.
#![allow(clippy::print_stdout, reason = "what it prints is what it is for")]

use anyhow::Context;
use clap::Parser;
use onboarding_testkit::application::{self, Load};
use std::io::Read;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Servers for tests and the demo.
#[derive(Parser)]
#[command(name = "onboarding-testkit")]
enum Command {
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
