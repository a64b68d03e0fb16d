# ctm_nb on a CPU: the notebooks to read, the commands, the demo. From the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t ctm_nb:cpu .
#   docker run --rm -v ctm_runs:/ctm/runs ctm_nb:cpu              trains the digits into the volume; run again to resume
#   docker run --rm -p 127.0.0.1:8888:8888 --entrypoint jupyter ctm_nb:cpu lab --ip=0.0.0.0 --no-browser nbs
# The tag says which Python; the digest says which bytes. To move on, change both.
ARG BASE=python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7
FROM ${BASE} AS build

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /ctm/env
ENV PATH=/ctm/env/bin:$PATH
COPY docker/constraints.txt /src/
# The CPU build of torch is a tenth of the size of the one on PyPI; its local version (+cpu) counts as newer. It comes first, in a layer that changes in our code do not touch.
RUN pip install --constraint /src/constraints.txt --extra-index-url ${TORCH_INDEX} "torch>=2.6" "torchvision>=0.21"
RUN pip install --constraint /src/constraints.txt jupyterlab ipykernel ipywidgets
WORKDIR /src
COPY settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY ctm_nb ctm_nb
RUN pip install --constraint /src/constraints.txt .

FROM ${BASE}
ENV PATH=/ctm/env/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
RUN useradd --create-home --uid 1000 ctm && mkdir -p /ctm/runs /ctm/data && chown -R ctm:ctm /ctm
COPY --from=build /ctm/env /ctm/env
COPY --chown=ctm:ctm nbs /ctm/nbs
USER ctm
WORKDIR /ctm
VOLUME ["/ctm/runs", "/ctm/data"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ctm_nb_train"]
