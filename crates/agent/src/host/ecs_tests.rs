use super::*;
use onboarding_core::identity::Thumbprint;
use onboarding_testkit::ecs as emulated;
use onboarding_testkit::sts::Cloud;

const TASK: &str = "16aeded318d842bb8226e5bc678cd446";

/// What ECS would tell a container whose endpoints are where the emulator is.
async fn task() -> (emulated::Ecs, Environment) {
    let task = emulated::Task {
        account: "123456789012".to_owned(),
        region: "us-east-2".to_owned(),
        zone: "us-east-2b".to_owned(),
        cluster: "bookinfo".to_owned(),
        task_id: TASK.to_owned(),
        role: Some("ratings-role".to_owned()),
        address: "10.0.0.4".parse().unwrap(),
    };
    let config = emulated::Config::new(&task, &Cloud::generate().unwrap()).unwrap();
    let server = emulated::start(config).await.unwrap();
    let environment = Environment {
        metadata_uri: Some(format!("http://{}{}", server.address, emulated::METADATA_PATH)),
        credentials_full_uri: Some(format!("http://{}{}", server.address, emulated::CREDENTIALS_PATH)),
        ..Environment::default()
    };
    (server, environment)
}

async fn evidence(environment: &Environment) -> Result<AwsEcsCredential, String> {
    let audience = Audience { plane_uid: "uid".to_owned(), challenge: vec![7; 32], key: Thumbprint([9; 32]) };
    let host = Ecs::new(environment).map_err(|error| crate::store::with_source(&error))?;
    let evidence = host.evidence(&audience, Timestamp::now()).await;
    let evidence = evidence.map_err(|error| crate::store::with_source(&error))?;
    assert_eq!(evidence.credential.type_url, AWS_ECS_CREDENTIAL);
    Ok(AwsEcsCredential::decode(evidence.credential.value.as_slice()).unwrap())
}

async fn addresses(environment: &Environment) -> Result<Vec<HostAddress>, String> {
    Ecs::new(environment).unwrap().addresses().await.map_err(|error| crate::store::with_source(&error))
}

#[tokio::test]
async fn a_task_shows_its_claims_and_a_request_signed_with_its_role() {
    let (server, environment) = task().await;
    let shown = evidence(&environment).await.unwrap();
    assert_eq!(shown.task_arn, format!("arn:aws:ecs:us-east-2:123456789012:task/bookinfo/{TASK}"));
    assert_eq!((shown.cluster.as_str(), shown.availability_zone.as_str()), ("bookinfo", "us-east-2b"));
    let role = shown.role.unwrap();
    assert_eq!(role.region, "us-east-2");
    assert_eq!(role.signature.len(), 64);

    let vpc = |ip: &str| HostAddress { ip: ip.parse().unwrap(), kind: ConnectedOver::Vpc };
    assert_eq!(addresses(&environment).await.unwrap(), [vpc("10.0.0.4")]);
    server.change(|task| task.addresses.push("2600:1f14::4".parse().unwrap()));
    assert_eq!(addresses(&environment).await.unwrap(), [vpc("10.0.0.4"), vpc("2600:1f14::4")]);
}

#[tokio::test]
async fn what_ecs_does_not_say_or_says_otherwise_is_named_with_the_way_out() {
    type Change = fn(&mut emulated::Config);
    let changes: [(Change, &str); 4] = [
        (|task| task.zone = None, "missing field `AvailabilityZone`"),
        (|task| task.task_arn = "arn:aws:ecs".to_owned(), "its TaskARN names no region"),
        (
            |task| task.task_arn = "arn:aws:ecs:us-east-2.evil.example/:1:task/a/b".to_owned(),
            "its TaskARN names no region",
        ),
        (|task| task.role = None, "with 400"),
    ];
    for (change, words) in changes {
        let (server, environment) = task().await;
        evidence(&environment).await.unwrap();
        server.change(change);
        let error = evidence(&environment).await.unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
    let (server, environment) = task().await;
    server.change(|task| task.network_mode = "bridge".to_owned());
    let error = addresses(&environment).await.unwrap_err();
    assert!(error.contains("the task's network mode is \"bridge\": set networkMode awsvpc"), "{error}");
    server.change(|task| {
        task.network_mode = "awsvpc".to_owned();
        task.addresses.clear();
    });
    let error = addresses(&environment).await.unwrap_err();
    assert!(error.contains("it names no address"), "{error}");
}

#[tokio::test]
async fn a_variable_that_ecs_would_not_make_is_refused_by_its_name() {
    let (_server, environment) = task().await;
    let set = |uri: &str| Some(uri.to_owned());
    let none = Environment::default();
    for (environment, words) in [
        (none.clone(), "ECS_CONTAINER_METADATA_URI_V4 isn't set"),
        (Environment { metadata_uri: set("https://169.254.170.2/v4/a"), ..none.clone() }, "must begin with http://"),
        (Environment { metadata_uri: set("http://evil.example/v4/a"), ..none.clone() }, "must name an IP address"),
        (Environment { metadata_uri: set("http://10.0.0.1/v4/a"), ..none.clone() }, "isn't of this host or link-local"),
        (
            Environment { metadata_uri: set("http://[2600::1]/v4/a"), ..none.clone() },
            "isn't of this host or link-local",
        ),
        (Environment { metadata_uri: set("a b"), ..none.clone() }, "isn't a URI"),
        (Environment { credentials_full_uri: None, ..environment.clone() }, "set taskRoleArn in its task definition"),
        (
            Environment { credentials_full_uri: set("http://52.1.2.3/role"), ..environment.clone() },
            "AWS_CONTAINER_CREDENTIALS_FULL_URI names an address",
        ),
        (
            Environment { credentials_relative_uri: set("http://169.254.170.2/a"), ..environment.clone() },
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must be a path",
        ),
        (
            Environment { credentials_relative_uri: set("v2/credentials"), ..environment.clone() },
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must be a path",
        ),
    ] {
        let error = evidence(&environment).await.unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
    for uri in ["http://169.254.170.2/v4/a", "http://[fd00:ec2::23]/v1/credentials", "http://127.0.0.1:8080/a/"] {
        endpoint(METADATA_VARIABLE, uri, None).unwrap();
    }
}

#[tokio::test]
async fn the_authorization_token_goes_with_the_full_uri_from_the_variable_or_the_file_as_it_is_now() {
    let (server, environment) = task().await;
    server.change(|task| task.authorization = Some("the token".to_owned()));
    assert!(evidence(&environment).await.unwrap_err().contains("with 401"));
    let token = |text: &str| Some(text.to_owned());
    evidence(&Environment { authorization_token: token("the token"), ..environment.clone() }).await.unwrap();

    let file = tempfile::NamedTempFile::new().unwrap();
    let environment = Environment { authorization_token_file: Some(file.path().to_owned()), ..environment };
    let error = evidence(&environment).await.unwrap_err();
    assert!(error.contains("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") && error.contains("one line"), "{error}");
    std::fs::write(file.path(), "the token\n").unwrap();
    evidence(&environment).await.unwrap();
    std::fs::write(file.path(), "two\r\nlines\n").unwrap();
    assert!(evidence(&environment).await.unwrap_err().contains("one line"));
}
