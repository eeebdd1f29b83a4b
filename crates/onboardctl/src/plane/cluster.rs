//! A cluster, asked with the user's kubeconfig and so with the user's rights.

use super::objects::{Resource, text};
use anyhow::{Context, anyhow};
use kube::api::{DeleteParams, GetParams, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Client, Config};
use onboarding_core::name::is_resource_name;
use serde_json::Value;
use std::env;
use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::runtime::Runtime;

pub struct Cluster {
    client: Client,
    runtime: Runtime,
    namespace: String,
    server: String,
}

/// Why something couldn't be asked of the cluster. `Display` has the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub kind: ProblemKind,
    /// What was attempted, and what came of it.
    pub words: String,
    pub way_out: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The user may not.
    Forbidden,
    /// The API server doesn't know who asks.
    Unauthorized,
    /// It doesn't serve this kind of object.
    Unknown,
    /// It doesn't answer, or isn't the right one.
    Away,
    /// It has no object of that name.
    Gone,
    Other,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.words, self.way_out)
    }
}
impl Error for Problem {}

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// One request, with what a kubeconfig's own login command takes.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
const PAGE: u32 = 500;
/// More of one kind than a cluster holds.
const MOST_OBJECTS: usize = 1_000_000;

/// A kubeconfig, or the account of a pod, is there to be tried.
pub fn may_be_configured() -> bool {
    !kubeconfig_paths().is_empty() || env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// The files that kubectl would read, of which those that aren't there are left out as it does.
fn kubeconfig_paths() -> Vec<PathBuf> {
    let named = env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
    let home = || env::home_dir().map(|home| vec![home.join(".kube/config")]).unwrap_or_default();
    let paths = named.map_or_else(home, |paths| env::split_paths(&paths).collect());
    paths.into_iter().filter(|path| path.exists()).collect()
}

/// Whole objects, or their metadata.
type Listing = fn(&Request, &ListParams) -> Result<http::Request<Vec<u8>>, kube::core::request::Error>;

impl Cluster {
    /// Reads the kubeconfig; nothing is asked yet.
    pub fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting up")?;
        let mut config = runtime.block_on(configuration(kubeconfig, context))?;
        config.connect_timeout = Some(CONNECT_WITHIN);
        config.read_timeout = Some(ANSWER_WITHIN);
        // Whoever waits at a terminal asks again himself.
        config.default_retry = false;
        let (namespace, server) = (config.default_namespace.clone(), config.cluster_url.to_string());
        anyhow::ensure!(
            is_resource_name(&namespace),
            "the kubeconfig's namespace {namespace:?} isn't a name of Kubernetes"
        );
        let login = config.auth_info.exec.as_ref().and_then(|exec| exec.command.clone());
        let client = {
            let _context = runtime.enter();
            Client::try_from(config).map_err(|error| match (&error, login) {
                (kube::Error::Auth(_), Some(login)) => anyhow!(
                    "logging in as the kubeconfig says, with the command {login:?}: {}; is it installed, and does it work by itself?",
                    chain(&error)
                ),
                _ => anyhow!("the kubeconfig can't be used: {}; try it with kubectl cluster-info", chain(&error)),
            })?
        };
        Ok(Self { client, runtime, namespace, server })
    }

    /// That of the context, as with kubectl.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn server(&self) -> &str {
        &self.server
    }

    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The version of the API server.
    pub fn version(&self) -> Result<String, Problem> {
        let request = http::Request::get("/version").body(Vec::new());
        let answer = self.ask("asking for the version", None, request.map_err(kube::Error::HttpError))?;
        Ok(answer["gitVersion"].as_str().unwrap_or("of an unknown version").to_owned())
    }

    /// Every object of this kind, of one namespace or of all; as the API server has them, with `apiVersion` and `kind`.
    pub fn list(&self, resource: &Resource, namespace: Option<&str>) -> Result<Vec<Value>, Problem> {
        self.list_selected(resource, namespace, ListParams::default(), Request::list)
    }

    /// The same without what is in them: only `metadata`.
    pub fn list_metadata(&self, resource: &Resource, namespace: Option<&str>) -> Result<Vec<Value>, Problem> {
        self.list_selected(resource, namespace, ListParams::default(), Request::list_metadata)
    }

    /// Only those of this name, in all namespaces, and only `metadata`.
    pub fn list_named(&self, resource: &Resource, name: &str) -> Result<Vec<Value>, Problem> {
        let named = ListParams::default().fields(&format!("metadata.name={name}"));
        self.list_selected(resource, None, named, Request::list_metadata)
    }

    fn list_selected(
        &self,
        resource: &Resource,
        namespace: Option<&str>,
        selected: ListParams,
        build: Listing,
    ) -> Result<Vec<Value>, Problem> {
        let what = format!("listing {}{}", resource.name(), place(namespace));
        let mut params = selected.limit(PAGE);
        let mut objects = Vec::new();
        loop {
            let request = build(&Request::new(resource.path(namespace)), &params).map_err(kube::Error::BuildRequest);
            let mut page = self.ask(&what, Some(resource), request)?;
            let is_list = text(&page, "/kind").ends_with("List");
            let items = match page.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => items,
                // A list of metadata without any.
                None | Some(Value::Null) if is_list => Vec::new(),
                _ => return Err(other(&what, "the answer is no list")),
            };
            // Objects of Kubernetes' own kinds come without these two in a list.
            objects.extend(items.into_iter().map(|mut item| {
                if let Value::Object(fields) = &mut item {
                    let version = [resource.group, "/", resource.version].concat();
                    fields.entry("apiVersion").or_insert(version.trim_start_matches('/').into());
                    fields.entry("kind").or_insert(resource.kind.into());
                }
                item
            }));
            match page.pointer("/metadata/continue").and_then(Value::as_str) {
                _ if objects.len() > MOST_OBJECTS => {
                    return Err(other(&what, "there are more than anybody can look at"));
                }
                Some(next) if !next.is_empty() => params = params.continue_token(next),
                _ => return Ok(objects),
            }
        }
    }

    /// `None`: there is none of this name.
    pub fn get(&self, resource: &Resource, namespace: &str, name: &str) -> Result<Option<Value>, Problem> {
        let what = format!("getting {} {name}{}", resource.name(), place(Some(namespace)));
        let request = Request::new(resource.path(Some(namespace))).get(name, &GetParams::default());
        self.unless_gone(self.ask(&what, Some(resource), request.map_err(kube::Error::BuildRequest)))
    }

    /// `false`: there was none of this name.
    pub fn delete(&self, resource: &Resource, namespace: &str, name: &str) -> Result<bool, Problem> {
        let what = format!("deleting {} {name}{}", resource.name(), place(Some(namespace)));
        let request = Request::new(resource.path(Some(namespace))).delete(name, &DeleteParams::background());
        let answer = self.ask(&what, Some(resource), request.map_err(kube::Error::BuildRequest));
        self.unless_gone(answer).map(|answer| answer.is_some())
    }

    fn unless_gone(&self, answer: Result<Value, Problem>) -> Result<Option<Value>, Problem> {
        match answer {
            Ok(value) => Ok(Some(value)),
            Err(problem) if problem.kind == ProblemKind::Gone => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    fn ask(
        &self,
        what: &str,
        resource: Option<&Resource>,
        request: Result<http::Request<Vec<u8>>, kube::Error>,
    ) -> Result<Value, Problem> {
        let answer = request.and_then(|request| {
            self.runtime.block_on(async {
                match tokio::time::timeout(ANSWER_WITHIN, self.client.request::<Value>(request)).await {
                    Ok(answer) => answer,
                    Err(_) => Err(kube::Error::Service(
                        format!("it didn't answer within {} s", ANSWER_WITHIN.as_secs()).into(),
                    )),
                }
            })
        });
        answer.map_err(|error| problem(what, resource, &self.server, &error))
    }
}

fn place(namespace: Option<&str>) -> String {
    namespace.map_or_else(|| " of all namespaces".to_owned(), |namespace| format!(" of the namespace {namespace}"))
}

fn other(what: &str, words: &str) -> Problem {
    Problem {
        kind: ProblemKind::Other,
        words: format!("{what}: {words}"),
        way_out: "try the same with kubectl -v=6".to_owned(),
    }
}

fn problem(what: &str, resource: Option<&Resource>, server: &str, error: &kube::Error) -> Problem {
    let kube::Error::Api(status) = error else {
        let is_http = matches!(error, kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::Auth(_));
        return Problem {
            kind: if is_http { ProblemKind::Away } else { ProblemKind::Other },
            words: format!("{what}: asking the API server at {server}: {}", chain(error)),
            way_out: match error {
                kube::Error::Auth(_) => "log in again as your kubeconfig does, or choose another --context".to_owned(),
                _ => "is it up, does this machine reach it, and is it the right --context? Try kubectl cluster-info"
                    .to_owned(),
            },
        };
    };
    let message = match status.message.trim() {
        "" => &status.reason,
        message => message,
    };
    let (kind, way_out) = match (status.code, resource) {
        (401, _) => (ProblemKind::Unauthorized, "log in again, or choose another --context".to_owned()),
        (403, Some(resource)) => (
            ProblemKind::Forbidden,
            format!(
                "ask whoever administers the cluster for a role that allows it (kubectl auth can-i --list shows what you have), for {}",
                resource.name()
            ),
        ),
        (403, None) => {
            (ProblemKind::Forbidden, "ask whoever administers the cluster for a role that allows it".to_owned())
        }
        // An object that isn't there is named by its kind and name; a kind that isn't served by nothing.
        (404, Some(_)) if status.details.as_ref().is_some_and(|details| !details.name.is_empty()) => {
            (ProblemKind::Gone, "look at those that there are".to_owned())
        }
        (404, Some(resource)) => {
            return Problem {
                kind: ProblemKind::Unknown,
                words: format!("{what}: the API server knows no {}", resource.name()),
                way_out: resource.way_to_have_it().to_owned(),
            };
        }
        _ => (ProblemKind::Other, "try the same with kubectl -v=6".to_owned()),
    };
    Problem { kind, words: format!("{what}: {message}"), way_out }
}

async fn configuration(kubeconfig: Option<&Path>, context: Option<&str>) -> anyhow::Result<Config> {
    let paths = kubeconfig.map_or_else(kubeconfig_paths, |path| vec![path.to_owned()]);
    if paths.is_empty() && context.is_none() && env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Config::incluster().map_err(|error| {
            anyhow!("this pod's own account can't be used: {}; name a kubeconfig with --kubeconfig", chain(&error))
        });
    }
    if paths.is_empty() {
        return Err(anyhow!("there is no kubeconfig in $KUBECONFIG or ~/.kube/config; name one with --kubeconfig"));
    }
    let mut merged = Kubeconfig::default();
    for path in &paths {
        let read = || format!("reading the kubeconfig {}", path.display());
        let next = Kubeconfig::read_from(path).map_err(|error| anyhow!("{}", chain(&error))).with_context(read)?;
        merged = merged.merge(next).map_err(|error| anyhow!("{}", chain(&error))).with_context(read)?;
    }
    let contexts: Vec<String> = merged.contexts.iter().map(|context| context.name.clone()).collect();
    let current = context.map(str::to_owned).or_else(|| merged.current_context.clone());
    let known = match contexts.as_slice() {
        [] => "it has no contexts".to_owned(),
        contexts => format!("there are: {}", contexts.join(", ")),
    };
    match current {
        None => return Err(anyhow!("the kubeconfig has no current context; choose one with --context ({known})")),
        Some(current) if !contexts.contains(&current) => {
            return Err(anyhow!("the kubeconfig has no context {current:?}; {known}"));
        }
        Some(_) => {}
    }
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    Config::from_custom_kubeconfig(merged, &options)
        .await
        .map_err(|error| anyhow!("the kubeconfig can't be used: {}", chain(&error)))
}

/// An error with its causes, each said once: most of them print their cause themselves.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plane::objects::{POLICIES, SECRETS};

    fn of_status(code: u16, name: &str) -> Problem {
        let text = format!(r#"{{"status":"Failure","code":{code},"message":"why","details":{{"name":"{name}"}}}}"#);
        let status = serde_json::from_str(&text).unwrap();
        problem("getting it", Some(&POLICIES), "https://x", &kube::Error::Api(status))
    }

    #[test]
    fn what_the_api_server_answers_has_a_way_out() {
        let forbidden = of_status(403, "");
        assert_eq!(forbidden.kind, ProblemKind::Forbidden);
        assert!(
            forbidden.to_string().starts_with("getting it: why; ask whoever administers the cluster"),
            "{forbidden}"
        );
        assert_eq!(of_status(401, "").kind, ProblemKind::Unauthorized);
        assert_eq!(of_status(404, "a").kind, ProblemKind::Gone);
        let unknown = of_status(404, "");
        assert_eq!(unknown.kind, ProblemKind::Unknown);
        assert!(unknown.to_string().contains("is Workload Onboarding installed"), "{unknown}");
        assert_eq!(of_status(500, "").to_string(), "getting it: why; try the same with kubectl -v=6");
    }

    #[test]
    fn paths_are_those_of_the_api() {
        assert_eq!(SECRETS.path(Some("a")), "/api/v1/namespaces/a/secrets");
        assert_eq!(POLICIES.path(None), "/apis/authorization.onboarding.tetrate.io/v1alpha1/onboardingpolicies");
    }
}
