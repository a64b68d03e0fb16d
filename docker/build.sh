#!/usr/bin/env bash
# Both images without a Docker engine and without a registry: a Debian base by mmdebstrap, the Dockerfiles by buildah;
# then each image is tried as its user: version, a plan, a run of a few steps that SIGTERM ends and that goes on.
#   docker/build.sh [cpu] [cuda]
# TORCH_INDEX: where torch's wheels are, if not where the Dockerfile says; BUILD_ARGS: more words for `buildah build`.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in buildah mmdebstrap; do
    command -v $tool >/dev/null || { echo "$tool is needed: apt install buildah mmdebstrap" >&2; exit 1; }
done
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! buildah inspect localhost/ctm_nb:base >/dev/null 2>&1; then
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3-venv,python-is-python3 bookworm "$work/base.tar"
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$work/base.tar" / >/dev/null
    buildah commit --quiet --rm "$base" localhost/ctm_nb:base >/dev/null
fi

for kind in "${@:-cpu}"; do
    started=$SECONDS
    # shellcheck disable=SC2086  # BUILD_ARGS are words
    buildah build --layers=false --build-arg BASE=localhost/ctm_nb:base ${TORCH_INDEX:+--build-arg TORCH_INDEX="$TORCH_INDEX"} \
        ${BUILD_ARGS:-} -f docker/$kind.Dockerfile -t ctm_nb:$kind .
    echo "ctm_nb:$kind built in $((SECONDS - started)) s"
    box=$(buildah from ctm_nb:$kind)
    within() { buildah run --user ctm --workingdir /ctm "$box" -- "$@"; }
    within ctm_nb_train --version
    test "$(within id -un)" = ctm
    few=(ctm_nb_train --name tried --steps 100,40 --set evaluate.n=0)
    within "${few[@]}" --dry-run | tail -n 3
    within sh -c '"$@" & pid=$!
        until test -s runs/tried/metrics.jsonl; do sleep 1; done
        kill -TERM $pid; wait $pid; test $? = 75' - "${few[@]}"
    within "${few[@]}" | tail -n 3
    within ctm_nb_sample runs/tried -n 4 --out pictures
    within sh -c 'ls pictures | head -n 3; du -sh /ctm/env'
    buildah rm "$box" >/dev/null
done
