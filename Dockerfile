# The service and the training in containers. The build needs BuildKit: Docker 23 or newer, or Docker 20.10 with
# DOCKER_BUILDKIT=1.
#
#   docker build -t dinov2-service .                                    the service on CPUs (target `serve`)
#   docker build -t dinov2-service:gpu --target serve-gpu .             with CUDA, from pip's wheels;
#                                        --build-arg TENSORRT=rtx       also with TensorRT for RTX, from PyPI
#                                        --build-arg TENSORRT=1         also with TensorRT, from NVIDIA's index
#   docker build -t dinov2-service:train --target train .               with torch and a C compiler; also takes TENSORRT
#
# --build-arg EXTRAS=milvus,parquet adds optional dependencies of pyproject.toml to any target.
#
# pip installs only files whose sha256 is in hashes/ (docs/security.md, Packages), except for EXTRAS and TensorRT. It
# takes only wheels, because what builds a source package would have no hash.
#
# Stages named `packages...` install what the project depends on, and stages named `venv...` add the project. None of
# the images runs as root. The service writes only to /data and /tmp, so the root file system can be read-only.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# Install the dependencies with empty packages instead of the project's. They change less often than the code, so Docker
# can reuse these layers.
FROM ${BASE_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./
COPY hashes hashes
RUN /opt/venv/bin/pip install --only-binary :all: --require-hashes -r hashes/serve.txt
ARG EXTRAS=
RUN mkdir cli model service training && touch README.md \
    && /opt/venv/bin/pip install --no-build-isolation -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

# Both builds of ONNX Runtime provide the same Python module, so remove the one for CPUs. hashes/gpu.txt does not have it,
# and without --no-deps pip would install it again.
#
# The packages of TensorRT are named instead of the extras of pyproject.toml, because an extra would also install the
# ONNX Runtime for CPUs again.
FROM packages AS packages-gpu
RUN /opt/venv/bin/pip uninstall -y onnxruntime \
    && /opt/venv/bin/pip install --only-binary :all: --require-hashes --no-deps -r hashes/gpu.txt
ARG TENSORRT=0
RUN case "$TENSORRT" in \
      0) ;; \
      1) /opt/venv/bin/pip install -c constraints.txt --extra-index-url https://pypi.nvidia.com \
         "tensorrt>=10.14" "cuda-bindings>=12.8" ;; \
      rtx) /opt/venv/bin/pip install -c constraints.txt "tensorrt-rtx>=1.7" "cuda-bindings>=12.8" ;; \
      *) echo "TENSORRT must be 0, 1 or rtx, not $TENSORRT" >&2; exit 1 ;; \
    esac

FROM packages AS packages-train
RUN /opt/venv/bin/pip install --only-binary :all: --require-hashes -r hashes/train.txt
ARG TENSORRT=0
RUN case "$TENSORRT" in \
      0) ;; \
      1) /opt/venv/bin/pip install -c constraints.txt --extra-index-url https://pypi.nvidia.com \
         "tensorrt>=10.14" "cuda-bindings>=12.8" ;; \
      rtx) /opt/venv/bin/pip install -c constraints.txt "tensorrt-rtx>=1.7" "cuda-bindings>=12.8" ;; \
      *) echo "TENSORRT must be 0, 1 or rtx, not $TENSORRT" >&2; exit 1 ;; \
    esac

# Remove the build folder of the empty packages first. Its files are newer than the code, so they would be built into
# the wheel instead of the code.
FROM packages AS code
COPY README.md ./
COPY cli cli
COPY model model
COPY service service
COPY training training
RUN rm -rf build && /opt/venv/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# The running service needs neither pip nor setuptools. Training keeps setuptools, which torch imports when it compiles.
FROM packages AS venv
COPY --from=code /wheels /wheels
RUN /opt/venv/bin/pip install --no-deps --force-reinstall /wheels/*.whl \
    && /opt/venv/bin/pip uninstall -y setuptools pip

FROM packages-gpu AS venv-gpu
COPY --from=code /wheels /wheels
RUN /opt/venv/bin/pip install --no-deps --force-reinstall /wheels/*.whl \
    && /opt/venv/bin/pip uninstall -y setuptools pip

FROM packages-train AS venv-train
COPY --from=code /wheels /wheels
RUN /opt/venv/bin/pip install --no-deps --force-reinstall /wheels/*.whl \
    && /opt/venv/bin/pip uninstall -y pip

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="dinov2-service" \
      org.opencontainers.image.description="DINOv2 image features over REST" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin dinov2 \
    && install -d -o dinov2 -g dinov2 /data /data/artifacts
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 \
    DINOV2_HOST=0.0.0.0 DINOV2_PORT=8000 DINOV2_DATA_DIR=/data
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Check /readyz, so that `docker compose up --wait` returns only when the service can embed images. The start period
# covers the download and export of a published model.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['DINOV2_PORT'] + '/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["dinov2", "serve"]

# While torch trains, Triton compiles the code that starts its kernels with a C compiler, and torch.compile may need a C++
# compiler. The header files of Python are in the base image. /tmp may forbid the execution of files, so compiled code is
# kept in /data.
FROM runtime AS train
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*
ENV CC=gcc TRITON_CACHE_DIR=/data/compiled/triton TORCHINDUCTOR_CACHE_DIR=/data/compiled/inductor \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=venv-train /opt/venv /opt/venv
USER 10001:10001
HEALTHCHECK NONE
CMD ["dinov2", "worker"]

# Some versions of NVIDIA's container toolkit mount only nvidia-smi by default, not the driver's CUDA library.
FROM runtime AS serve-gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=venv-gpu /opt/venv /opt/venv
USER 10001:10001

# The last stage is the default target.
FROM runtime AS serve
COPY --from=venv /opt/venv /opt/venv
USER 10001:10001
