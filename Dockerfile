# The service in a container: slim Python, a virtual environment made in a build stage, no root, nothing written outside
# /data and /tmp, so that the root file system can be read-only. Any builder since Docker 20.10 takes it.
#
#   docker build -t dinov2-service .                               CPU
#   docker build -t dinov2-service:gpu --build-arg VARIANT=gpu .   CUDA comes with pip's wheels
#   docker build -t dinov2-service:train --build-arg VARIANT=train .   torch, for deploy/training/
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG VARIANT=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
WORKDIR /src
# Dependencies first, with empty packages in the project's place: they change less often than the code, and this layer
# is kept.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir cli model service training && touch README.md && /opt/venv/bin/pip install -c constraints.txt .
# Both builds of ONNX Runtime are one Python module, so the GPU one is installed after both are gone.
RUN if [ "$VARIANT" = gpu ]; then \
      /opt/venv/bin/pip install -c constraints.txt ".[gpu]" \
      && /opt/venv/bin/pip uninstall -y onnxruntime onnxruntime-gpu \
      && /opt/venv/bin/pip install -c constraints.txt --no-deps onnxruntime-gpu; \
    elif [ "$VARIANT" = train ]; then /opt/venv/bin/pip install -c constraints.txt ".[train]"; \
    elif [ "$VARIANT" != cpu ]; then echo "VARIANT must be cpu, gpu or train, not $VARIANT" >&2; exit 1; fi
COPY README.md ./
COPY cli cli
COPY model model
COPY service service
COPY training training
# The empty packages' build folder goes first: its files are newer than the code and would be taken for current.
# What installs is not needed by what runs.
RUN rm -rf build && /opt/venv/bin/pip install --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall -y setuptools pip

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="dinov2-service" \
      org.opencontainers.image.description="DINOv2 image features over REST" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin dinov2 \
    && install -d -o dinov2 -g dinov2 /data /data/artifacts
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 \
    DINOV2_HOST=0.0.0.0 DINOV2_PORT=8000 DINOV2_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Ready, not merely alive: `docker compose up --wait` returns when an image can be embedded.
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['DINOV2_PORT'] + '/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["dinov2", "serve"]
