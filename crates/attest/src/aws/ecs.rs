//! Amazon ECS: AWS says whose role a task holds; what else the task says of itself stays a claim.
//!
//! A task has no signed document. Its role's session is named after the task, but whoever may assume the role names sessions as
//! they like; that the two agree is therefore required, and proves nothing.

use super::sts::{Callers, Principal};
use super::{ask, region};
use crate::{AttestError, Context, shown};
use onboarding_core::identity::{Attested, AwsCompute, AwsIdentity, Fact, Identity, Proven, Replay};
use onboarding_wire::onboarding::AwsEcsCredential;

/// What a task says of itself, in the form that AWS would give it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskClaims {
    /// That of the region.
    pub partition: &'static str,
    /// 12 digits.
    pub account: String,
    pub region: String,
    pub zone: String,
    pub cluster: String,
    /// 32 hexadecimal digits, or a UUID as older tasks have it.
    pub task_id: String,
}

pub(crate) async fn attest(
    callers: &Callers,
    credential: &AwsEcsCredential,
    context: Context<'_>,
) -> Result<Attested, AttestError> {
    let task = TaskClaims::read(credential).map_err(AttestError::Refused)?;
    let Some(parts) = &credential.role else {
        return Err(AttestError::Refused(
            "the task has no IAM role, and nothing else proves who it is: set taskRoleArn in its task definition"
                .into(),
        ));
    };
    let caller = ask(callers, parts, &task.region, "the task's role", context).await?;
    if caller.account != task.account || caller.partition != task.partition {
        return Err(AttestError::Refused(format!(
            "the task says that it is of account {} ({}), but its role is of account {} ({:.64})",
            task.account, task.partition, caller.account, caller.partition
        )));
    }
    let role = match caller.principal {
        Principal::Role { name, session } if session == task.task_id => name,
        Principal::Role { name, session } => {
            return Err(AttestError::Refused(format!(
                "the task says that it is {}, but the session of role {name:?} is called {session:?}: it isn't the task's",
                task.task_id
            )));
        }
        Principal::Instance { id } => {
            return Err(AttestError::Refused(format!(
                "the caller that should be the role of task {} is instance {id}",
                task.task_id
            )));
        }
    };
    let proven = |value: String| Fact::from(Proven::by_attestor(value));
    let identity = Identity::Aws(AwsIdentity {
        partition: proven(caller.partition),
        account: proven(caller.account),
        region: Fact::claimed(task.region),
        zone: Fact::claimed(task.zone),
        compute: AwsCompute::Ecs {
            task_id: Fact::claimed(task.task_id),
            cluster: Fact::claimed(task.cluster),
            iam_role: Some(proven(role)),
        },
    });
    Ok(Attested { identity, issuer_short_name: None, replay: Replay::BoundToKey })
}

impl TaskClaims {
    /// Errors say what isn't as AWS would have it.
    pub fn read(credential: &AwsEcsCredential) -> Result<Self, String> {
        let AwsEcsCredential { task_arn, cluster, availability_zone: zone, .. } = credential;
        let not = |what: &str, text: &str| format!("the task's {what} {} isn't one", shown(text));
        let ["arn", partition, "ecs", region, account, resource] = task_arn.splitn(6, ':').collect::<Vec<_>>()[..]
        else {
            return Err(not("ARN", task_arn));
        };
        // The region chooses the STS host that is asked: only one of AWS's.
        let of_region = region::partition(region).filter(|of_region| *of_region == partition);
        let Some(partition) = of_region.filter(|_| super::document::is_account(account)) else {
            return Err(not("ARN", task_arn));
        };
        let cluster = cluster_name(cluster, &format!("arn:{partition}:ecs:{region}:{account}:cluster/"))
            .ok_or_else(|| not("cluster", cluster))?;
        // Tasks with the older form of ARN don't have the cluster in it.
        let task_id = match resource.split('/').collect::<Vec<_>>()[..] {
            ["task", id] => id,
            ["task", of, id] if of == cluster => id,
            ["task", of, _] => {
                return Err(format!(
                    "the task's ARN names the cluster {}, but the task says that it is in {cluster:?}",
                    shown(of)
                ));
            }
            _ => return Err(not("ARN", task_arn)),
        };
        if !is_task_id(task_id) {
            return Err(not("ARN", task_arn));
        }
        if !super::document::is_zone_of(zone, region) {
            return Err(format!("the task's availability zone {} isn't one of region {region}", shown(zone)));
        }
        Ok(Self {
            partition,
            account: account.to_owned(),
            region: region.to_owned(),
            zone: zone.clone(),
            cluster: cluster.to_owned(),
            task_id: task_id.to_owned(),
        })
    }
}

/// ECS gives a name or an ARN. A name has up to 255 letters, digits, underscores and hyphens.
fn cluster_name<'a>(cluster: &'a str, arn: &str) -> Option<&'a str> {
    let name = cluster.strip_prefix(arn).unwrap_or(cluster);
    let all = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    ((1..=255).contains(&name.len()) && all).then_some(name)
}

fn is_task_id(id: &str) -> bool {
    let digits = |part: &str, count: usize| {
        part.len() == count && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<&str> = id.split('-').collect();
    match parts[..] {
        [all] => digits(all, 32),
        [a, b, c, d, e] => digits(a, 8) && digits(b, 4) && digits(c, 4) && digits(d, 4) && digits(e, 12),
        _ => false,
    }
}
