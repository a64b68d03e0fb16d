# ctm_nb for training on NVIDIA GPUs. From the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t ctm_nb:cuda .
#   docker run --rm --gpus all --ipc host --stop-timeout 120 -v "$PWD/data":/ctm/data -v ctm_runs:/ctm/runs ctm_nb:cuda --preset cifar10 --data data/cifar10
#   several GPUs:  docker run ... --entrypoint torchrun ctm_nb:cuda --nproc_per_node 8 /ctm/env/bin/ctm_nb_train --preset cifar10 --data data/cifar10
# CUDA itself comes with torch's wheels; the host needs NVIDIA's driver and container toolkit, nothing else.
# `docker stop` sends SIGTERM: the step is finished and saved (exit code 75), if --stop-timeout leaves the time.
ARG BASE=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7
FROM ${BASE} AS build

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /ctm/env
ENV PATH=/ctm/env/bin:$PATH
COPY docker/constraints.txt /src/
RUN pip install --constraint /src/constraints.txt --extra-index-url ${TORCH_INDEX} "torch>=2.6" "torchvision>=0.21"
WORKDIR /src
COPY settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY ctm_nb ctm_nb
RUN pip install --constraint /src/constraints.txt ".[all]"

FROM ${BASE}
# torch.compile translates with a C++ compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PATH=/ctm/env/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 ctm && mkdir -p /ctm/runs /ctm/data && chown -R ctm:ctm /ctm
COPY --from=build /ctm/env /ctm/env
USER ctm
WORKDIR /ctm
VOLUME ["/ctm/runs", "/ctm/data"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ctm_nb_train"]
