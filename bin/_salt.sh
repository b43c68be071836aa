# shellcheck shell=bash
# Sourced by bin/apply and bin/salt-call: finds this host's Salt, or installs one, and runs
# salt-call with this checkout's formula, without a master, beside a minion that may be installed.

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PREFIX=/opt/autobot-slm-database
CONFIG=/var/lib/autobot-slm-database/salt
CACHE=/var/cache/autobot-slm-database/salt
LOGS=/var/log/autobot-slm-database

export HOME="${HOME:-/root}"
export PATH="${PATH:+$PATH:}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Salt reads and writes UTF-8 whatever the host's locale is; apt must not ask.
[ -n "${LC_ALL:-}${LANG:-}" ] || export LANG=C.UTF-8
export DEBIAN_FRONTEND=noninteractive
# By default Salt's exit status is 0 if a signal ends it, as if its work were done.
export SALT_HARD_CRASH=1
# What libpq and Debian's programs would obey: another server, another version.
unset PYTHONHOME PYTHONPATH "${!PG@}"
umask 022

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

say() { printf '==> %s\n' "$*" >&2; }

# Runs a command; what it says is shown only if it fails.
quietly() {
  local said status=0
  said=$("$@" 2>&1) || status=$?
  [ "$status" = 0 ] || printf '%s\n' "$said" >&2
  return "$status"
}

need_root() {
  [ "$(id -u)" = 0 ] || die "must run as root: sudo $0"
}

# Prints the salt-call that is installed already, if there is one.
installed_salt() {
  local found own
  own=$(readlink -f "$CHECKOUT/bin/salt-call")
  for found in "$(command -v salt-call || true)" /opt/saltstack/salt/salt-call; do
    if [ -x "$found" ] && [ "$(readlink -f "$found")" != "$own" ]; then
      printf '%s\n' "$found"
      return
    fi
  done
}

# Installs the Debian packages that are missing for a Python virtual environment.
ensure_python() {
  python3 -c 'import ensurepip, venv' 2>/dev/null && [ -e /etc/ssl/certs/ca-certificates.crt ] && return
  say "Installing Python (python3, python3-venv, ca-certificates)"
  local apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  quietly "${apt[@]}" update || die "apt-get update failed; the host needs its Debian mirror"
  quietly "${apt[@]}" install -y --no-install-recommends python3 python3-venv ca-certificates ||
    die "apt-get install python3 python3-venv ca-certificates failed; see above"
}

# Prints the directory that the pinned Salt of this checkout belongs in.
salt_directory() {
  local python
  python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  printf '%s/salt-%s\n' "$PREFIX" \
    "$({ echo "$python" && cat "$CHECKOUT"/requirements/host-3008*.txt; } | sha256sum | cut -c1-12)"
}

# Makes the virtual environment. The mark is written last: without it the directory is rubbish from
# an interrupted run, and is made anew.
build_salt() {
  local directory=$1
  local pip=("$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-input
    --require-hashes --no-deps)
  say "Installing Salt in $directory (once, about a minute)"
  rm -rf "$directory"
  python3 -m venv "$directory" || die "python3 -m venv $directory failed; see above"
  "${pip[@]}" --only-binary=:all: -r "$CHECKOUT/requirements/host-3008.txt" >&2 ||
    die "installing Salt's requirements failed; the host needs a Python package index"
  "${pip[@]}" --no-build-isolation -r "$CHECKOUT/requirements/host-3008-salt.txt" >&2 ||
    die "installing Salt failed; see above"
  sync -f "$directory"
  touch "$directory/.complete"
  # The one of before stays: somebody may be using it right now.
  local old former
  former=$(readlink "$PREFIX/salt" || true)
  for old in "$PREFIX"/salt-*; do
    if [ "$old" != "$directory" ] && [ "$old" != "$former" ]; then rm -rf "$old"; fi
  done
}

# Prints the salt-call of this checkout's own Salt, installed now if need be.
own_salt() {
  ensure_python
  local directory
  directory=$(salt_directory)
  if [ ! -e "$directory/.complete" ]; then
    mkdir -p "$PREFIX"
    exec 8>"$PREFIX/.lock"
    flock 8
    [ -e "$directory/.complete" ] || build_salt "$directory" 8>&-
    exec 8>&-
  fi
  # One name that stays, for whoever calls Salt later from outside (timers, the operator).
  if [ "$(readlink "$PREFIX/salt" || true)" != "$directory" ]; then
    ln -sfn "$directory" "$PREFIX/.salt.$$" && mv -fT "$PREFIX/.salt.$$" "$PREFIX/salt"
  fi
  printf '%s\n' "$directory/bin/salt-call"
}

find_salt() {
  SALT_CALL=$(installed_salt)
  if [ -z "$SALT_CALL" ]; then
    SALT_CALL=$(own_salt) || exit 1
  fi
}

# Prints the Python that a salt-call runs on.
python_of() {
  local script
  script=$(readlink -f "$1")
  local beside
  for beside in "${script%/*}/bin/python3" "${script%/*}/python3"; do
    if [ "${script%/*}" != /usr/bin ] && [ -x "$beside" ]; then
      printf '%s\n' "$beside"
      return
    fi
  done
  printf 'python3\n'
}

# Writes the masterless configuration: an installed minion's own (its id, grains and pillar stay
# what they are), over which go the few settings that keep the two apart.
write_config() {
  mkdir -p "$CONFIG" "$CACHE" "$LOGS"
  chmod 0700 "$CONFIG" "$CACHE"
  {
    printf '%s\n' 'file_client: local' 'master_type: disable' 'fileserver_backend: [roots]' \
      'use_master_when_local: false' 'saltenv: null' 'minion_id_caching: false' 'user: root' \
      'test: false' \
      "cachedir: $CACHE" "extension_modules: $CACHE/extmods" "pki_dir: $CONFIG/pki" \
      "sock_dir: $CACHE/run" "pidfile: $CACHE/pid" "log_file: $LOGS/salt-call.log"
    if [ -s /etc/salt/minion_id ]; then
      printf "id: '%s'\n" "$(tr -d "\n'" </etc/salt/minion_id)"
    fi
  } | replace "$CONFIG/masterless.conf"
  {
    echo 'include:'
    [ ! -e /etc/salt/minion ] || echo '  - /etc/salt/minion'
    ! compgen -G '/etc/salt/minion.d/*.conf' >/dev/null || echo '  - /etc/salt/minion.d/*.conf'
    echo "  - $CONFIG/masterless.conf"
  } | replace "$CONFIG/minion"
  if [ ! -e /etc/salt/grains ]; then
    rm -f "$CONFIG/grains"
  elif [ "$(readlink "$CONFIG/grains" || true)" != /etc/salt/grains ]; then
    ln -sfn /etc/salt/grains "$CONFIG/grains"
  fi
}

# Replaces a file with what comes in, if it differs: a report comes on a full disk as well. Two runs
# at once must not see half a file.
replace() {
  local text new=''
  text=$(cat)
  if [ -e "$1" ] && cmp -s "$1" <<<"$text"; then return; fi
  if ! { new=$(mktemp "$1.XXXXXX") && cat >"$new" <<<"$text" && mv -f "$new" "$1"; }; then
    rm -f "$new"
    die "$1 cannot be written: see above"
  fi
}

# Prints the value of the last --file-root in the arguments.
file_root_of() {
  local previous='' argument root=''
  for argument in "$@"; do
    [ "$previous" != --file-root ] || root=$argument
    case $argument in --file-root=*) root=${argument#*=} ;; esac
    previous=$argument
  done
  printf '%s\n' "$root"
}

# Fills MASTERLESS: salt-call and the options that go before the caller's. Modules are loaded from
# the same root as the SLS files, so a call sees the formula as it is, synced or not.
masterless() {
  local root
  root=$(file_root_of "$@")
  MASTERLESS=("$SALT_CALL" --config-dir="$CONFIG" --local --module-dirs="${root:-$CHECKOUT}")
  # Salt 3008 takes several roots and the first wins: ours only where the caller names none.
  [ -n "$root" ] || MASTERLESS+=(--file-root="$CHECKOUT")
}
