#!/bin/sh
# Installs the Istio sidecar and the Workload Onboarding Agent on this machine, from https://@HOST@/install/
#
#   curl -fLO https://@HOST@/install/onboard.sh
#   sudo sh onboard.sh --group NAMESPACE/NAME
#
# --group NAMESPACE/NAME  the WorkloadGroup to join: writes /etc/onboarding-agent/onboarding.config.yaml and starts the agent.
#                         Without it the packages are installed, and nothing else is done.
# --revision REVISION     the sidecar of this revision of Istio
# --keep-current          also makes the repository known to apt or dnf, signed: apt-get upgrade or dnf upgrade then keeps both current
#
# A CA that this machine doesn't trust yet: sudo CURL_CA_BUNDLE=FILE sh onboard.sh ...
# With --group the agent trusts it too, from then on: it becomes /etc/onboarding-agent/root-certs.pem, unless there is one.
# Run again, it installs the newest packages.
set -eu

REPOSITORY='https://@HOST@'
ENDPOINT='@NAME@'
CONFIG=/etc/onboarding-agent/onboarding.config.yaml
ROOTS=/etc/onboarding-agent/root-certs.pem

fail() {
    echo "onboard.sh: $*" >&2
    exit 1
}

# What this machine takes: deb or rpm, amd64 or arm64.
recognise() {
    if command -v apt-get >/dev/null; then
        format=deb
    elif command -v dnf >/dev/null || command -v yum >/dev/null; then
        format=rpm
    else
        fail "there is no apt-get, dnf or yum: take the packages from $REPOSITORY/install/ and install them by hand"
    fi
    case $(uname -m) in
        x86_64) architecture=amd64 ;;
        aarch64) architecture=arm64 ;;
        *) fail "there are no packages for $(uname -m)" ;;
    esac
}

# Downloads $2 from the directory $1 of the repository into $work. The checksum comes first, and names the package by its
# content: so both are of one package, even while it is replaced.
download() {
    curl -fsSL -o "$work/$2.sha256" "$REPOSITORY/install/$1/$2.sha256" ||
        fail "there is no $REPOSITORY/install/$1/$2: $REPOSITORY/install/ says what there is"
    digest=$(cut -d ' ' -f 1 <"$work/$2.sha256")
    case $digest in
        '' | *[!0-9a-f]*) fail "$REPOSITORY/install/$1/$2.sha256 is no checksum" ;;
    esac
    curl -fSL --retry 3 -o "$work/$2" "$REPOSITORY/install/sha256/$digest/$2" ||
        fail "$2 could not be downloaded, or was replaced meanwhile: run this once more"
    (cd "$work" && sha256sum --check "$2.sha256") || fail "$2 is not what its checksum says"
}

# A file that somebody edited stays, and a new one lies beside it (.dpkg-dist, .rpmnew): dpkg would ask, and give up where nobody
# is there to answer. At first boot unattended-upgrades may hold dpkg's lock for minutes.
install_packages() {
    case $format in
        deb)
            DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold install -y "$@"
            ;;
        rpm) if command -v dnf >/dev/null; then dnf install -y "$@"; else yum install -y "$@"; fi ;;
    esac
}

configure() {
    mkdir -p "${CONFIG%/*}"
    if [ -n "${CURL_CA_BUNDLE:-}" ] && [ ! -e "$ROOTS" ]; then
        install -m 644 "$CURL_CA_BUNDLE" "$ROOTS"
    fi
    cat >"$CONFIG.new" <<CONFIGURATION
apiVersion: config.agent.onboarding.tetrate.io/v1alpha1
kind: OnboardingConfiguration
onboardingEndpoint:
  host: "$ENDPOINT"
workloadGroup:
  namespace: "$1"
  name: "$2"
CONFIGURATION
    if [ -e "$CONFIG" ] && ! cmp -s "$CONFIG" "$CONFIG.new"; then
        cp -p "$CONFIG" "$CONFIG.before"
        echo "onboard.sh: what was in $CONFIG is in $CONFIG.before"
    fi
    mv "$CONFIG.new" "$CONFIG"
}

# Makes the repository known to the package manager, for the agent and the sidecar of this revision. Its key was downloaded over
# the same TLS as this script; from here on everything is checked against it.
keep_current() {
    suite=stable base=''
    if [ -n "$1" ]; then suite=istio-$1 base=istio-$1/; fi
    curl -fsSL -o "$work/onboarding.asc" "$REPOSITORY/install/onboarding.asc" ||
        fail "the repository is not signed: there is no $REPOSITORY/install/onboarding.asc"
    ca=''
    if [ -n "${CURL_CA_BUNDLE:-}" ]; then
        ca=/etc/pki/onboarding/ca.pem
        mkdir -p /etc/pki/onboarding
        install -m 644 "$CURL_CA_BUNDLE" "$ca"
    fi
    case $format in
        deb)
            mkdir -p /etc/apt/keyrings /etc/apt/sources.list.d /etc/apt/apt.conf.d
            install -m 644 "$work/onboarding.asc" /etc/apt/keyrings/onboarding.asc
            if [ -n "$ca" ]; then
                echo "Acquire::https::$ENDPOINT::CAInfo \"$ca\";" >/etc/apt/apt.conf.d/90onboarding
            fi
            echo "deb [signed-by=/etc/apt/keyrings/onboarding.asc] $REPOSITORY/install/apt $suite main" \
                >/etc/apt/sources.list.d/onboarding.list
            ;;
        rpm)
            mkdir -p /etc/pki/onboarding /etc/yum.repos.d
            install -m 644 "$work/onboarding.asc" /etc/pki/onboarding/onboarding.asc
            cat >/etc/yum.repos.d/onboarding.repo <<REPOSITORY
[onboarding]
name=Workload Onboarding
baseurl=$REPOSITORY/install/yum/$base\$basearch
enabled=1
gpgcheck=1
repo_gpgcheck=1
gpgkey=file:///etc/pki/onboarding/onboarding.asc
${ca:+sslcacert=$ca}
REPOSITORY
            ;;
    esac
    echo "onboard.sh: the repository is known; upgrades come with those of this machine"
}

main() {
    # What it writes is for everybody to read, whatever root's own umask.
    umask 022
    group='' sidecars='' revision='' current=''
    while [ $# -gt 0 ]; do
        if [ "$1" = --keep-current ]; then
            current=yes
            shift
            continue
        fi
        [ $# -gt 1 ] || fail "$1 needs a value"
        case $1 in
            --group) group=$2 ;;
            --revision) sidecars=istio-sidecar/$2/ revision=$2 ;;
            *) fail "$1 is unknown: --group NAMESPACE/NAME, --revision REVISION, --keep-current" ;;
        esac
        shift 2
    done
    case $group in
        '') ;;
        */*/* | /* | */ | *[!-a-z0-9./]*) fail "--group is NAMESPACE/NAME, as in bookinfo/ratings" ;;
        */*) ;;
        *) fail "--group is NAMESPACE/NAME, as in bookinfo/ratings" ;;
    esac
    case $revision in
        *[!-a-z0-9]*) fail "--revision is that of an Istio, as in 1-28" ;;
    esac
    [ "$(id -u)" = 0 ] || fail "packages are installed by root: run it with sudo"
    recognise
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Whoever installs may be another user (apt's _apt).
    chmod 755 "$work"
    download "$sidecars$format/$architecture" "istio-sidecar.$format"
    download "$format/$architecture" "onboarding-agent.$format"
    install_packages "$work/istio-sidecar.$format" "$work/onboarding-agent.$format"
    if [ -n "$current" ]; then keep_current "$revision"; fi
    if [ -n "$group" ]; then
        configure "${group%%/*}" "${group#*/}"
        systemctl enable onboarding-agent
        systemctl restart onboarding-agent
        echo "onboard.sh: the agent runs; journalctl -u onboarding-agent says how it joins $group"
    else
        echo "onboard.sh: installed. Edit $CONFIG, then: systemctl enable --now onboarding-agent"
    fi
}

# The last line: a script that was cut off does nothing.
main "$@"
