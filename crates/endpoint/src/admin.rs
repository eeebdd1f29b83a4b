//! The admin socket: what `onboardctl` asks and deletes. A Unix socket that only the plane's own user can open.

use crate::authority::Authority;
use crate::backend::{Admits, ProvisionError, Snapshot};
use crate::certificate::Certificates;
use anyhow::Context;
use axum::extract::{Path, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Event, Live, State};
use onboarding_kinds::war;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

#[derive(Clone)]
struct Admin {
    authority: Arc<Authority>,
    certificates: Arc<Certificates>,
}

/// Opens the socket (0600) and serves until `stop`.
pub(crate) fn serve(
    path: PathBuf,
    authority: Arc<Authority>,
    certificates: Arc<Certificates>,
    stop: CancellationToken,
) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    // Left behind by a plane that was killed; the data directory's lock says that none is running.
    if path.exists() {
        std::fs::remove_file(&path).with_context(|| format!("removing the old {}", path.display()))?;
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("opening the admin socket {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protecting the admin socket {}", path.display()))?;
    let app = Router::new()
        .route("/v1/workloads", get(list))
        .route("/v1/workloads/{namespace}/{name}", get(show).delete(delete))
        .route("/v1/status", get(status))
        .route("/v1/mesh/root", get(root).post(rotate_root))
        .with_state(Admin { authority, certificates });
    Ok(tokio::spawn(async move {
        let served = axum::serve(listener, app).with_graceful_shutdown(async move { stop.cancelled().await }).await;
        if let Err(error) = served {
            tracing::error!(%error, "the admin socket failed");
        }
        let _ = std::fs::remove_file(path);
    }))
}

async fn list(Shared(admin): Shared<Admin>) -> Response {
    let snapshot = admin.authority.snapshot();
    match admin.authority.lifecycle.list().await {
        Ok(all) => {
            let mut items: Vec<(RegistrationName, Value)> = all
                .into_iter()
                .filter_map(|(name, state)| match state {
                    State::Live(live) => {
                        let resource = resource(&snapshot, &name, &live);
                        Some((name, resource))
                    }
                    State::Absent | State::Ended(_) => None,
                })
                .collect();
            items.sort_by(|(a, _), (b, _)| a.cmp(b));
            let items: Vec<Value> = items.into_iter().map(|(_, resource)| resource).collect();
            Json(json!({ "items": items })).into_response()
        }
        Err(error) => unavailable(&error.to_string()),
    }
}

async fn show(Shared(admin): Shared<Admin>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let name = RegistrationName { namespace, name };
    match admin.authority.lifecycle.load(&name).await {
        Ok(state) => match state {
            State::Live(live) => Json(resource(&admin.authority.snapshot(), &name, &live)).into_response(),
            State::Absent | State::Ended(_) => not_found(format!("there is no registration {name}")),
        },
        Err(error) => unavailable(&error.to_string()),
    }
}

async fn delete(Shared(admin): Shared<Admin>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let name = RegistrationName { namespace, name };
    let before = match admin.authority.lifecycle.load(&name).await {
        Ok(state) => state,
        Err(error) => return unavailable(&error.to_string()),
    };
    let key_known = match &before {
        State::Absent => {
            return not_found(format!("there is no registration {name}, and no key is remembered for it"));
        }
        State::Ended(ended) => ended.key.is_some(),
        State::Live(_) => true,
    };
    match admin.authority.lifecycle.apply(&name, Event::Delete).await {
        Ok(_) => {
            tracing::info!(registration = %name, "deleted by an operator");
            Json(json!({ "deleted": matches!(before, State::Live(_)), "keyForgotten": key_known })).into_response()
        }
        Err(error) => unavailable(&error.to_string()),
    }
}

async fn status(Shared(admin): Shared<Admin>) -> Response {
    let snapshot = admin.authority.snapshot();
    let mut faults = snapshot.faults.clone();
    faults.extend(admin.certificates.fault());
    let missing = admin.authority.readiness.reasons();
    Json(json!({
        "ready": missing.is_empty(),
        "missing": missing,
        "faults": faults,
        "policyUnreadable": snapshot.policy_unreadable,
        "sessions": admin.authority.lifecycle.sessions().count(),
        "uid": snapshot.plane.as_ref().map(|plane| plane.uid.clone()),
        "hosts": snapshot.plane.as_ref().map(|plane| plane.hosts.clone()),
        "generation": snapshot.generation,
    }))
    .into_response()
}

async fn root(Shared(admin): Shared<Admin>) -> Response {
    root_of(&admin, false).await
}

/// Begins to replace it.
async fn rotate_root(Shared(admin): Shared<Admin>) -> Response {
    root_of(&admin, true).await
}

async fn root_of(admin: &Admin, rotate: bool) -> Response {
    let provisioner = admin.authority.backend.provisioner.clone();
    match tokio::task::spawn_blocking(move || provisioner.root(rotate)).await {
        Ok(Ok(root)) => Json(json!({
            "stage": root.stage,
            "roots": root.roots,
            "endsAt": root.ends_at.to_string(),
            "nextStepAt": root.next_step_at.map(|at| at.to_string()),
        }))
        .into_response(),
        Ok(Err(ProvisionError::Refused(message))) => {
            (StatusCode::CONFLICT, Json(json!({ "message": message }))).into_response()
        }
        Ok(Err(ProvisionError::Unavailable(message))) => unavailable(&message),
        Err(error) => unavailable(&error.to_string()),
    }
}

/// As `kubectl` would show it, and whether a policy admits it as things are now, which is ours.
fn resource(snapshot: &Snapshot, name: &RegistrationName, live: &Live) -> Value {
    let mut resource = war::resource(name, live, None);
    let admits = snapshot.admits(live);
    let by = match &admits {
        Admits::Policy { name, rule } => Some((name.as_str(), *rule)),
        Admits::Unknown | Admits::Nobody => None,
    };
    resource["status"]["admitted"] = by.is_some().into();
    if admits != Admits::Nobody
        && let Some(conditions) = resource["status"]["conditions"].as_array_mut()
    {
        let mut condition = war::admitted(by);
        // What isn't admitted ends, so it has been for as long as it is there.
        condition["lastTransitionTime"] = live.created_at.to_string().into();
        conditions.push(condition);
    }
    resource
}

fn not_found(message: String) -> Response {
    (StatusCode::NOT_FOUND, Json(json!({ "message": message }))).into_response()
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "message": why }))).into_response()
}
