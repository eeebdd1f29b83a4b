//! `onboardctl workloads`: the live registrations of a plane or a cluster, and how to delete one.

use crate::outcome::{Outcome, json, printable};
use crate::plane::objects::WARS;
use crate::plane::{Access, Plane};
use anyhow::{bail, ensure};
use jiff::Timestamp;
use onboarding_core::name::{RegistrationName, is_resource_name};
use serde_json::{Value, json};
use std::fmt::Write;

/// List the workloads that are registered, or delete registrations
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl workloads
  onboardctl workloads -n bookinfo -o wide
  onboardctl workloads -o json --data-dir /srv/onboarding
  onboardctl workloads delete bookinfo/ratings-jwt-my-corp--vm007

  onboardctl workloads --context production -A

The table has the columns of kubectl get war: NAME, AGENT CONNECTED, AGE. Where more than
one namespace is listed, and with -A, each line begins with its NAMESPACE.
In a cluster the namespace is that of the context where neither -n nor -A is given; of a
standalone plane all are listed.

Exit codes: 0; 1 where the plane can't be asked, or there is no such workload.")]
pub struct Workloads {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Only of this namespace
    #[arg(short, long, global = true, value_name = "NAMESPACE", value_parser = crate::cli::namespace)]
    namespace: Option<String>,
    /// Of all namespaces, each line with its own
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    #[default]
    Table,
    Wide,
    Yaml,
    Json,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// End a registration and forget its key, so that the host may come with another one
    #[command(after_help = "Example:
  onboardctl workloads delete bookinfo/ratings-jwt-my-corp--vm007

The entry leaves the mesh and the session ends. A host that a policy still admits comes back
by itself. Of a standalone plane also a registration that has ended already can be named: its
key is forgotten. In a cluster it is the same as kubectl delete war.")]
    Delete {
        /// NAMESPACE/NAME, or NAME with -n; in a cluster, NAME alone is in the context's namespace
        #[arg(required = true, value_name = "NAMESPACE/NAME")]
        names: Vec<String>,
    },
}

impl Workloads {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        let plane = access.plane()?;
        match &self.verb {
            Some(Verb::Delete { names }) => self.delete(&plane, names),
            None => self.list(&plane, Timestamp::now()),
        }
    }

    fn list(&self, plane: &Plane, now: Timestamp) -> anyhow::Result<Outcome> {
        let namespace = match plane {
            _ if self.all_namespaces => None,
            Plane::Cluster(cluster) => Some(self.namespace.as_deref().unwrap_or(cluster.namespace())),
            Plane::Socket(_) => self.namespace.as_deref(),
        };
        let mut items = match plane {
            Plane::Socket(socket) => socket.workloads()?,
            Plane::Cluster(cluster) => cluster.list(&WARS, namespace)?,
        };
        if let Some(namespace) = namespace {
            items.retain(|item| text(item, "/metadata/namespace") == namespace);
        }
        let place =
            |item: &Value| (text(item, "/metadata/namespace").to_owned(), text(item, "/metadata/name").to_owned());
        items.sort_by_cached_key(place);
        let list = |items: Vec<Value>| json!({ "apiVersion": "v1", "kind": "List", "items": items });
        Ok(match self.output {
            Output::Json => Outcome::text(json(&list(items))),
            Output::Yaml => Outcome::text(serde_yaml_ng::to_string(&list(items))?),
            Output::Table | Output::Wide if items.is_empty() => {
                let place = namespace.map(|it| format!(" in the namespace {it}")).unwrap_or_default();
                Outcome { notes: vec![format!("No workloads are registered{place}.")], ..Outcome::default() }
            }
            Output::Table | Output::Wide => {
                let several = items
                    .windows(2)
                    .any(|pair| text(&pair[0], "/metadata/namespace") != text(&pair[1], "/metadata/namespace"));
                let columns = columns(self.all_namespaces || several, self.output == Output::Wide);
                Outcome::text(table(&columns, &items, now))
            }
        })
    }

    /// Names are read before the first registration is deleted.
    fn delete(&self, plane: &Plane, names: &[String]) -> anyhow::Result<Outcome> {
        let default = match plane {
            Plane::Cluster(cluster) => Some(self.namespace.as_deref().unwrap_or(cluster.namespace())),
            Plane::Socket(_) => self.namespace.as_deref(),
        };
        let names = names.iter().map(|name| self.registration(name, default)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut outcome = Outcome::default();
        for name in names {
            match delete_one(plane, &name) {
                Ok(said) => {
                    let _ = writeln!(outcome.out, "{name} {said}");
                }
                // What was done before isn't lost to whoever reads this.
                Err(error) => {
                    outcome.notes.push(format!("onboardctl: deleting {name}: {error:#}"));
                    outcome.code = crate::outcome::FAILED;
                }
            }
        }
        Ok(outcome)
    }

    fn registration(&self, text: &str, default: Option<&str>) -> anyhow::Result<RegistrationName> {
        let (namespace, name) = match (text.split_once('/'), &self.namespace) {
            (Some((namespace, _)), Some(other)) if namespace != other => {
                bail!("{text} isn't of the namespace {other}, which -n names")
            }
            (Some((namespace, name)), _) => (namespace, name),
            (None, _) => match default {
                Some(namespace) => (namespace, text),
                None => bail!("{text}: name its namespace too, as in bookinfo/{text} or with -n bookinfo"),
            },
        };
        for part in [namespace, name] {
            ensure!(
                is_resource_name(part),
                "{text}: {part:?} isn't a name of Kubernetes, so nothing is registered under it"
            );
        }
        Ok(RegistrationName { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

/// What is said of it.
fn delete_one(plane: &Plane, name: &RegistrationName) -> anyhow::Result<&'static str> {
    const DELETED: &str = "deleted; its host may come back, also with another key";
    match plane {
        Plane::Cluster(cluster) => match cluster.delete(&WARS, &name.namespace, &name.name)? {
            true => Ok(DELETED),
            false => bail!("there is no registration {name}; onboardctl workloads -A lists those that there are"),
        },
        Plane::Socket(socket) => {
            let answer = socket.delete(&format!("/v1/workloads/{}/{}", name.namespace, name.name))?;
            let is = |field: &str| answer.get(field).and_then(Value::as_bool).unwrap_or(false);
            Ok(match (is("deleted"), is("keyForgotten")) {
                (true, _) => DELETED,
                (false, true) => "had ended already; its key is forgotten, so its host may come with another",
                (false, false) => "had ended already, and no key was remembered",
            })
        }
    }
}

/// A column's heading, and what it says of one war.
type Column = (&'static str, fn(&Value, Timestamp) -> String);

fn columns(with_namespace: bool, wide: bool) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    if with_namespace {
        columns.push(("NAMESPACE", |war, _| text(war, "/metadata/namespace").to_owned()));
    }
    columns.push(("NAME", |war, _| text(war, "/metadata/name").to_owned()));
    columns.push(("AGENT CONNECTED", |war, _| condition(war, "AgentConnected")));
    columns.push(("AGE", age));
    if wide {
        columns.push(("GROUP", |war, _| text(war, "/metadata/ownerReferences/0/name").to_owned()));
        columns.push(("HEALTHY", |war, _| condition(war, "Healthy")));
        columns.push(("ADDRESS", |war, _| address(war)));
        columns.push(("CONNECTED TO", |war, _| text(war, "/status/activeAgentConnection/connectedTo").to_owned()));
        columns.push(("AGENT", |war, _| text(war, "/spec/registration/agent/version").to_owned()));
    }
    columns
}

/// Three spaces between columns, as kubectl has them. What agents said of themselves is among it, so nothing is printed raw.
fn table(columns: &[Column], items: &[Value], now: Timestamp) -> String {
    let heading = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect::<Vec<_>>();
    let cell = |(_, of): &Column, war: &Value| match printable(&of(war, now)) {
        text if text.is_empty() => "<none>".to_owned(),
        text => text,
    };
    let rows = items.iter().map(|war| columns.iter().map(|column| cell(column, war)).collect::<Vec<_>>());
    let rows: Vec<Vec<String>> = std::iter::once(heading).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    rows.iter().fold(String::new(), |mut out, row| {
        let line = row.iter().zip(&widths).fold(String::new(), |mut line, (cell, &width)| {
            let _ = write!(line, "{cell:width$}   ");
            line
        });
        let _ = writeln!(out, "{}", line.trim_end());
        out
    })
}

fn text<'a>(war: &'a Value, pointer: &str) -> &'a str {
    war.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The status of a condition.
fn condition(war: &Value, kind: &str) -> String {
    let conditions = war.pointer("/status/conditions").and_then(Value::as_array);
    let found = conditions.into_iter().flatten().find(|condition| text(condition, "/type") == kind);
    found.map_or_else(|| "Unknown".to_owned(), |condition| text(condition, "/status").to_owned())
}

/// The first of the kind that the mesh uses.
fn address(war: &Value) -> String {
    let kind = text(war, "/spec/registration/settings/connectedOver");
    let addresses = war.pointer("/spec/registration/host/addresses").and_then(Value::as_array);
    let found = addresses.into_iter().flatten().find(|address| text(address, "/type") == kind);
    found.map_or_else(String::new, |address| text(address, "/ip").to_owned())
}

fn age(war: &Value, now: Timestamp) -> String {
    match text(war, "/metadata/creationTimestamp").parse::<Timestamp>() {
        Ok(since) => human(now.as_second().saturating_sub(since.as_second()).max(0)),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// Seconds as kubectl says them (`HumanDuration` of k8s.io/apimachinery/pkg/util/duration).
fn human(seconds: i64) -> String {
    let (minutes, hours, days, years) = (seconds / 60, seconds / 3600, seconds / 86_400, seconds / 31_536_000);
    let two = |large: i64, unit: char, small: i64, fine: char| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small}{fine}"),
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 192 => two(days, 'd', hours % 24, 'h'),
        () if days < 730 => format!("{days}d"),
        () if years < 8 => two(years, 'y', days % 365, 'd'),
        () => format!("{years}y"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_as_kubectl_says_them() {
        let cases = [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (599, "9m59s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (28_799, "7h59m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (176_400, "2d1h"),
            (691_200, "8d"),
            (63_071_999, "729d"),
            (63_072_000, "2y"),
            (63_158_400, "2y1d"),
            (252_288_000, "8y"),
        ];
        for (seconds, wanted) in cases {
            assert_eq!(human(seconds), wanted, "{seconds}");
        }
    }

    #[test]
    fn what_an_agent_says_of_itself_is_not_printed_raw() {
        let war = json!({
            "metadata": { "name": "a" },
            "spec": { "registration": { "agent": { "version": "\u{1b}[2Jfine" } } },
        });
        let shown = table(&columns(false, true), &[war], Timestamp::UNIX_EPOCH);
        assert!(shown.contains("\\u{1b}[2Jfine") && !shown.contains('\u{1b}'), "{shown}");
    }
}
