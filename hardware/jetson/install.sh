#!/bin/sh
# The edge agent on a Jetson: sudo sh install.sh DEB [--gpu WHEEL]
#
#   JetPack 7 (Ubuntu 24.04, Python 3.12)   make deb TARGET_PYTHON=3.12
#   JetPack 6 (Ubuntu 22.04, Python 3.10)   make deb TARGET_PYTHON=3.11; Python 3.11 is installed
#                                           from the deadsnakes archive, beside the system's own
#
# The package brings ONNX Runtime for the CPU. --gpu takes a wheel of onnxruntime-gpu that NVIDIA
# built for this JetPack and this Python, puts it before the package's, and gives the service access
# to the GPU. It survives updates of the package; running this without --gpu removes it. See
# docs/fleet.md.
set -eu

fail() {
    echo "install: $1" >&2
    exit 2
}

deb=${1:-}
[ -f "$deb" ] || fail "which package? sudo sh install.sh stillhouse-edge-agent_..._arm64.deb"
shift
wheel=
if [ "${1:-}" = --gpu ]; then
    wheel=${2:-}
    [ -f "$wheel" ] || fail "--gpu wants the file of a wheel, onnxruntime_gpu-...-linux_aarch64.whl"
fi

[ "$(id -u)" = 0 ] || fail "run it as root: sudo sh install.sh $deb"
[ "$(dpkg --print-architecture)" = arm64 ] || fail "this machine is not arm64"
[ "$(dpkg-deb --field "$deb" Architecture)" = arm64 ] || fail "$deb is not for arm64: make deb"
[ -f /etc/nv_tegra_release ] || echo "install: no /etc/nv_tegra_release; is this a Jetson?" >&2

# The package names the Python that it is for.
python=$(dpkg-deb --field "$deb" Depends | grep -o 'python3\.[0-9]*' | head -n 1)
tag=cp$(echo "${python#python}" | tr -d .)
if [ -n "$wheel" ]; then
    case $(basename "$wheel") in
        onnxruntime_gpu-*"-$tag-"*aarch64.whl) ;;
        *) fail "$(basename "$wheel"): expected onnxruntime_gpu-...-$tag-...aarch64.whl" ;;
    esac
fi

. /etc/os-release
# Ubuntu 22.04's own Python 3.11 is a release candidate.
if [ "${ID:-}-${VERSION_ID:-}" = ubuntu-22.04 ]; then
    apt-get install --yes software-properties-common
    add-apt-repository --yes ppa:deadsnakes/ppa
    apt-get update
fi
apt-get install --yes "$python" "$(readlink -f "$deb")"

local=/opt/stillhouse/local
site=/opt/stillhouse/lib/$python/site-packages
limits=/etc/systemd/system/stillhouse-edge-agent.service.d
rm -rf "$local" "$site/local.pth" "$limits/gpu.conf"
if [ -n "$wheel" ]; then
    mkdir -p "$local" "$limits"
    # A wheel is a zip file. Unpacking it is enough, since the package has all that it needs.
    "$python" -m zipfile -e "$wheel" "$local"
    echo "import sys; sys.path.insert(1, '$local')" > "$site/local.pth"
    printf '[Service]\nPrivateDevices=no\nSupplementaryGroups=video render\n' > "$limits/gpu.conf"
    chmod -R go+rX "$local" "$limits"
    # Ask a session of the agent's user: the wheel may be built for CUDA and yet not open it here.
    if ! su -s /bin/sh -G video -G render stillhouse -c "/opt/stillhouse/bin/python3 -I -c '
import edge_agent, onnxruntime as ort
from pathlib import Path
graph = Path(\"/opt/stillhouse/share/stillhouse/resnet8/eval.onnx\")
used = ort.InferenceSession(graph, providers=ort.get_available_providers()).get_providers()
print(\"onnxruntime\", ort.__version__, used)
raise SystemExit(\"CUDAExecutionProvider\" not in used)'"; then
        rm -rf "$local" "$site/local.pth" "$limits/gpu.conf"
        fail "this wheel cannot use CUDA here, and was removed again; the CPU does the work"
    fi
fi
systemctl daemon-reload
systemctl --no-block try-restart stillhouse-edge-agent.service
echo "installed; next: copy the settings from orchestrator enroll to /etc/stillhouse/agent.toml"
