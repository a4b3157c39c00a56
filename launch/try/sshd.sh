#!/bin/bash
# Two hosts on one machine, to try deepspeed: ssh to 127.0.0.2 and 127.0.0.3, which both are this machine.
#   launch/try/sshd.sh COMMAND [ARGUMENTS]
# Starts an ssh server for these two addresses with keys of its own, runs COMMAND with an `ssh` that uses them, and
# removes all of it. Touches neither ~/.ssh nor a server that is running. Needs root and openssh-server.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,5p' "$0"; exit 2; }
port=${PORT:-2022}
folder=$(mktemp -d)
clean_up() { [ -z "${server:-}" ] || kill "$server" 2>/dev/null || true; rm -rf "$folder"; }
trap clean_up EXIT
trap 'exit 130' INT TERM

ssh-keygen -q -t ed25519 -N '' -f "$folder/host"
ssh-keygen -q -t ed25519 -N '' -f "$folder/user"
cat > "$folder/sshd_config" <<END
ListenAddress 127.0.0.2:$port
ListenAddress 127.0.0.3:$port
HostKey $folder/host
AuthorizedKeysFile $folder/user.pub
PidFile none
# The folder is below /tmp, which anyone may write to.
StrictModes no
PasswordAuthentication no
END
cat > "$folder/ssh_config" <<END
Host 127.0.0.*
    Port $port
    IdentityFile $folder/user
    IdentitiesOnly yes
    UserKnownHostsFile $folder/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
END
mkdir "$folder/bin"
printf '#!/bin/sh\nexec %s -F %s/ssh_config "$@"\n' "$(command -v ssh)" "$folder" > "$folder/bin/ssh"
chmod +x "$folder/bin/ssh"
mkdir -p /run/sshd
"$(command -v sshd || echo /usr/sbin/sshd)" -D -f "$folder/sshd_config" &
server=$!
for _ in $(seq 50); do
    "$folder/bin/ssh" -o ConnectTimeout=1 127.0.0.3 true 2>/dev/null && break
    sleep 0.1
done
PATH="$folder/bin:$PATH" "$@"
