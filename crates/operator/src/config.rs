//! What the ConfigMap `onboarding-plane-config` holds: YAML with the plane's `uid`, and whatever others added. Pure.

use serde_yaml_ng::{Mapping, Value};

pub const NAME: &str = "onboarding-plane-config";
pub const KEY: &str = "config.yaml";
const UID: &str = "uid";

/// The `uid` in it; `None` where there is none yet.
///
/// # Errors
/// It can't be read, in words: then nobody may replace it, as it may hold the audience that agents' credentials are made for.
pub fn uid(yaml: Option<&str>) -> Result<Option<String>, String> {
    match map(yaml)?.get(UID) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(uid)) if uid.is_empty() => Ok(None),
        Some(Value::String(uid)) => Ok(Some(uid.clone())),
        Some(_) => Err("its uid isn't a text".to_owned()),
    }
}

/// The same with this `uid`, and unchanged where it has that already.
///
/// # Errors
/// As [`uid`].
pub fn with_uid(yaml: Option<&str>, wanted: &str) -> Result<String, String> {
    if uid(yaml)?.as_deref() == Some(wanted)
        && let Some(yaml) = yaml
    {
        return Ok(yaml.to_owned());
    }
    let mut map = map(yaml)?;
    map.insert(UID.into(), wanted.into());
    serde_yaml_ng::to_string(&map).map_err(|error| error.to_string())
}

fn map(yaml: Option<&str>) -> Result<Mapping, String> {
    match serde_yaml_ng::from_str(yaml.unwrap_or_default()) {
        Ok(Value::Mapping(map)) => Ok(map),
        Ok(Value::Null) => Ok(Mapping::new()),
        Ok(_) => Err(format!("its key {KEY} isn't a map")),
        Err(error) => Err(format!("its key {KEY} isn't YAML: {}", error.to_string().escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_added_to_what_is_there_and_nothing_else_changes() {
        assert_eq!(uid(None), Ok(None));
        assert_eq!(uid(Some("uid: \"\"\n")), Ok(None));
        assert_eq!(with_uid(None, "here").unwrap(), "uid: here\n");
        assert_eq!(with_uid(Some("logLevel: debug\n"), "here").unwrap(), "logLevel: debug\nuid: here\n");
        let commented = "# by hand\nuid:   here\n";
        assert_eq!(with_uid(Some(commented), "here").unwrap(), commented);
        assert_eq!(uid(Some(&with_uid(Some(commented), "there").unwrap())), Ok(Some("there".to_owned())));
    }

    #[test]
    fn what_cannot_be_read_is_not_replaced() {
        for (yaml, why) in [("- a", "isn't a map"), ("{", "isn't YAML"), ("uid: 5", "its uid isn't a text")] {
            let error = with_uid(Some(yaml), "here").unwrap_err();
            assert!(error.contains(why), "{yaml}: {error}");
        }
    }
}
