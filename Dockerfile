# Neuron Atlas in a container. The command `atlas` is the entry point.
#
# Build:
#   docker build -t neuron-atlas:0.1.0 .
#   docker build --build-arg EXTRAS=cluster -t neuron-atlas:0.1.0 .    # with Ray's dashboard and Jobs API: jobs/kuberay.yaml
#
# Run the default atlas; results are written to ./runs:
#   docker run --rm --shm-size=4g -v "$PWD/runs:/work/runs" neuron-atlas:0.1.0 run
#
# With GPUs (needs the NVIDIA Container Toolkit) and a mounted dataset, read-only:
#   docker run --rm --gpus all --shm-size=4g -v "$PWD/runs:/work/runs" -v /path/to/images:/data:ro neuron-atlas:0.1.0 \
#       run experiment=overnight data=folder data.root=/data
#
# --shm-size is the memory for Ray's object store; Docker's default of 64 MB is too small. engine=inline needs none.
FROM python:3.11-slim

# The C loops of pipeline/kernels are compiled at run time for the processor of the machine. Without a compiler they are
# replaced by slower PyTorch code.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Optional dependencies of pyproject.toml, for example "cluster" or "cluster,heic".
ARG EXTRAS=""
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

# As in scripts/atlas: threads of PyTorch that wait for each other keep their core busy for a short time only.
ENV GOMP_SPINCOUNT=3000 PYTHONUNBUFFERED=1

# Relative paths, such as run.root=runs, are relative to this folder.
WORKDIR /work
ENTRYPOINT ["atlas"]
