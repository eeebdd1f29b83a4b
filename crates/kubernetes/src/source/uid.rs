//! The plane's UID where the ControlPlane names none: made once, by whoever is first, and kept in a ConfigMap.
//!
//! The operator manages the same ConfigMap; nothing of it is touched but the absent `uid`.

use super::objects::{PLANE_CONFIG, PLANE_CONFIG_KEY, PlaneConfig};
use crate::names::{FIELD_MANAGER, MANAGED_BY};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use serde_yaml_ng::{Mapping, Value};
use std::time::Duration;

const LONGEST_UID: usize = 1024;
const WITHIN: Duration = Duration::from_secs(10);

/// The UID in `config.yaml`, if it has one.
///
/// # Errors
/// It isn't a YAML map, or its `uid` is none; in words.
pub(crate) fn read(yaml: Option<&str>) -> Result<Option<String>, String> {
    match map(yaml)?.get("uid") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(uid)) if uid.is_empty() => Ok(None),
        Some(Value::String(uid)) if uid.len() <= LONGEST_UID && !uid.contains(char::is_whitespace) => {
            Ok(Some(uid.clone()))
        }
        Some(_) => Err(format!("uid must be a text of at most {LONGEST_UID} characters without spaces")),
    }
}

fn map(yaml: Option<&str>) -> Result<Mapping, String> {
    let Some(yaml) = yaml else { return Ok(Mapping::new()) };
    match serde_yaml_ng::from_str(yaml) {
        Ok(Value::Mapping(map)) => Ok(map),
        Ok(Value::Null) => Ok(Mapping::new()),
        Ok(_) => Err("isn't a map".to_owned()),
        Err(error) => Err(format!("isn't YAML: {}", error.to_string().escape_debug())),
    }
}

/// `config.yaml` with this UID and all that was in it.
fn with(yaml: Option<&str>, uid: &str) -> Result<String, String> {
    let mut map = map(yaml)?;
    map.insert("uid".into(), uid.into());
    serde_yaml_ng::to_string(&map).map_err(|error| error.to_string())
}

/// Stores a new UID, unless somebody else stored something meanwhile: then the informer shows what.
pub(crate) async fn make(client: Client, namespace: &str, held: Option<&PlaneConfig>) -> Result<(), String> {
    let api: Api<ConfigMap> = Api::namespaced(client, namespace);
    let yaml = with(held.and_then(|held| held.yaml.as_deref()), &uuid::Uuid::new_v4().to_string())?;
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let write = async {
        match held {
            None => {
                let labels = [(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())];
                let metadata = ObjectMeta {
                    name: Some(PLANE_CONFIG.to_owned()),
                    labels: Some(labels.into()),
                    ..ObjectMeta::default()
                };
                let data = Some([(PLANE_CONFIG_KEY.to_owned(), yaml)].into());
                api.create(&params, &ConfigMap { metadata, data, ..ConfigMap::default() }).await
            }
            Some(held) => {
                let mut object = api.get(PLANE_CONFIG).await?;
                // What was seen is what is amended.
                object.metadata.resource_version = Some(held.version.clone());
                object.data.get_or_insert_default().insert(PLANE_CONFIG_KEY.to_owned(), yaml);
                api.replace(PLANE_CONFIG, &params, &object).await
            }
        }
    };
    match tokio::time::timeout(WITHIN, write).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok(()),
        Ok(Err(error)) => Err(super::follow::chain(&error)),
        Err(_) => Err(format!("not answered within {WITHIN:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uid_is_added_to_what_is_there() {
        assert_eq!(read(None), Ok(None));
        assert_eq!(read(Some("")), Ok(None));
        assert_eq!(read(Some("logLevel: debug\n")), Ok(None));
        assert_eq!(read(Some("uid: here\n")), Ok(Some("here".to_owned())));
        let added = with(Some("logLevel: debug\n"), "here").unwrap();
        assert_eq!(added, "logLevel: debug\nuid: here\n");
        assert_eq!(read(Some(&added)), Ok(Some("here".to_owned())));
    }

    #[test]
    fn what_is_no_uid_is_said_and_not_replaced() {
        for (yaml, why) in [
            ("- a\n", "isn't a map"),
            ("{", "isn't YAML"),
            ("uid: [a]\n", "uid must be a text"),
            ("uid: 5\n", "uid must be a text"),
            ("uid: a b\n", "without spaces"),
        ] {
            let error = read(Some(yaml)).unwrap_err();
            assert!(error.contains(why), "{yaml}: {error}");
        }
        assert!(with(Some("- a\n"), "here").is_err());
    }
}
