# Neuron Atlas in a container: for workstations, Kubernetes (jobs/kuberay.yaml) and Slurm sites with Apptainer.
#
#   docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t neuron-atlas:0.1.0 .
#
# The default has PyTorch with CUDA, which also runs on CPUs. A third of its size is the image for CPUs only, from the index of
# PyTorch's CPU wheels (its address is on https://pytorch.org/get-started):
#
#   docker build --build-arg TORCH_INDEX=ADDRESS -t neuron-atlas:0.1.0-cpu .
#
# All libraries have the versions and sha256 of jobs/requirements/*.txt (PyTorch for CPUs: the version only). The base image is
# named by a tag, which its publishers move to newer builds. For the same image each time, give its digest, which is in the label
# org.opencontainers.image.base.digest of every published image:
#
#   docker buildx imagetools inspect --format '{{.Manifest.Digest}}' python:3.11.13-slim-bookworm
#   docker build --build-arg PYTHON=3.11.13-slim-bookworm@sha256:DIGEST -t neuron-atlas:0.1.0 .
#
# Run the default atlas; results are written to ./runs, which must belong to user 1000 (or add --user "$(id -u)"):
#
#   docker run --rm --shm-size=4g -v "$PWD/runs:/work/runs" neuron-atlas:0.1.0 run
#
# With GPUs (needs the NVIDIA Container Toolkit) and a mounted dataset, read-only:
#
#   docker run --rm --gpus all --shm-size=4g -v "$PWD/runs:/work/runs" -v /path/to/images:/data:ro neuron-atlas:0.1.0 \
#       run experiment=overnight data=folder data.root=/data
#
# --shm-size is the memory for Ray's object store; Docker's default of 64 MB is too small. engine=inline needs none.
ARG PYTHON=3.11.13-slim-bookworm
FROM python:${PYTHON}

# gcc and libgomp: the C loops of pipeline/kernels are compiled at run time for the processor of the machine; without, slower
# PyTorch code replaces them. bash and wget: KubeRay's start commands and probes call them. procps: jobs/ssh.yaml calls pkill.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash gcc libc6-dev libgomp1 procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 atlas \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash atlas \
    && mkdir /app /work \
    && chown atlas:atlas /app /work

USER 1000:1000
WORKDIR /app
COPY --chown=1000:1000 . .

# Into /app/.venv, with Ray's dashboard and Jobs API, which jobs/kuberay.yaml needs.
ARG TORCH_INDEX=""
RUN PIP_NO_CACHE_DIR=1 TORCH_INDEX="${TORCH_INDEX}" scripts/setup --locked \
    && .venv/bin/atlas --version

# As in scripts/atlas: threads of PyTorch that wait for each other keep their core busy for a short time only.
ENV PATH=/app/.venv/bin:$PATH GOMP_SPINCOUNT=3000 PYTHONUNBUFFERED=1

ARG COMMIT=unknown
ARG BASE_DIGEST=unknown
LABEL org.opencontainers.image.title="Neuron Atlas" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${COMMIT}" \
    org.opencontainers.image.base.digest="${BASE_DIGEST}"

# Relative paths, such as run.root=runs, are relative to this folder.
WORKDIR /work
ENTRYPOINT ["atlas"]
