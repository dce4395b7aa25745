# python_export: a checkpoint into one folder of weights per stage (`export`), and a look at what is there (`validate`). These two need
# only Python's standard library; `quantize` needs torch: run it from a checkout (cmake/deps.sh oracle).
#   docker build -f dockerfiles/export.Dockerfile -t localhost/qwen-export:0.1.0 .
#   docker run --rm -v CHECKPOINT:/model:ro -v WEIGHTS:/weights localhost/qwen-export:0.1.0 export --help
ARG BASE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3=3.11.* && rm -rf /var/lib/apt/lists/*
COPY python_export/__init__.py python_export/__main__.py python_export/checkpoint.py python_export/export.py \
     python_export/shapes.py python_export/validate.py /opt/qwen/python_export/
ENV PYTHONPATH=/opt/qwen PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["/usr/bin/python3", "-m", "python_export"]
