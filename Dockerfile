# The service in a container. A build stage creates the virtual environment on the slim Python image. The service does
# not run as root and writes only to /data and /tmp, so the root file system can be read-only. The build needs Docker
# 20.10 or newer.
#
#   docker build -t dinov2-service .                               CPU
#   docker build -t dinov2-service:gpu --build-arg VARIANT=gpu .   with CUDA, from pip's wheels
#   docker build -t dinov2-service:train --build-arg VARIANT=train .   with torch, for deploy/training/
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG VARIANT=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
WORKDIR /src
# Install the dependencies first, with empty packages instead of the project's. They change less often than the code, so
# Docker can reuse this layer.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir cli model service training && touch README.md && /opt/venv/bin/pip install -c constraints.txt .
# Both builds of ONNX Runtime provide the same Python module, so remove both and then install the GPU build.
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
# Remove the build folder of the empty packages first. Its files are newer than the code, so they would be installed
# instead of the code. The running service needs neither pip nor setuptools.
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
# Check /readyz, so that `docker compose up --wait` returns only when the service can embed images. The start period
# covers the download and export of a published model.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['DINOV2_PORT'] + '/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["dinov2", "serve"]
