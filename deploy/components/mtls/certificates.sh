#!/bin/sh
# Makes the certificates of agents and generator, by an authority that lives in this folder only:
#
#     certificates.sh FOLDER
#
# writes FOLDER/agent, FOLDER/generator and, for people who read, FOLDER/reader, each with ca.crt, tls.crt and tls.key, and
# prints the commands that make or renew the Secrets of the first two. It needs openssl and nothing else. Run again, it makes new certificates by the same authority; with FOLDER
# gone, everything has to be replaced at once.
set -eu
umask 077

folder=${1:?"usage: certificates.sh FOLDER"}
days=${DAYS:-825}
namespace=${NAMESPACE:-microshield}
name=microshield-generator
mkdir -p "$folder/agent" "$folder/generator" "$folder/reader"
cd "$folder"

key() {
    openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null ||
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

if [ ! -f authority.key ]; then
    key authority.key
    openssl req -x509 -new -key authority.key -sha256 -days 3650 -subj "/CN=MicroShield" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign -out authority.crt
fi

# issue FOLDER USAGE NAMES
issue() {
    key "$1/tls.key"
    openssl req -new -key "$1/tls.key" -subj "/CN=microshield-$1" -out "$1/request"
    printf '%s\n' \
        "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" "extendedKeyUsage=$2" \
        "subjectAltName=$3" >"$1/extensions"
    openssl x509 -req -in "$1/request" -CA authority.crt -CAkey authority.key -CAcreateserial -sha256 -days "$days" \
        -extfile "$1/extensions" -out "$1/tls.crt" 2>/dev/null
    rm "$1/request" "$1/extensions"
    cp authority.crt "$1/ca.crt"
}

issue generator serverAuth "DNS:$name,DNS:$name.$namespace,DNS:$name.$namespace.svc"
issue agent clientAuth "DNS:microshield-agent"
issue reader clientAuth "DNS:microshield-reader"

for part in agent generator; do
    cat <<END
kubectl -n $namespace create secret generic microshield-$part-tls --type=kubernetes.io/tls \\
    --from-file=$folder/$part/ca.crt --from-file=$folder/$part/tls.crt --from-file=$folder/$part/tls.key \\
    --dry-run=client -o yaml | kubectl apply -f -
END
done
