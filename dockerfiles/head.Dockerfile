# qwen-head: HTTP, tokenizer, pictures, scheduler. No LibTorch, no CUDA, no shell: an empty image with one program and its libraries.
#   docker build -f dockerfiles/head.Dockerfile -t localhost/qwen-head:0.1.0 .
ARG BASE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

FROM ${BASE} AS build
WORKDIR /src
# What is installed changes seldom, so it is a layer of its own; deps.sh reads the pins of all its parts.
COPY cmake/deps.sh cmake/deps.sh
COPY python_export/requirements.txt python_export/requirements.txt
COPY tests/cluster/kube tests/cluster/kube
RUN cmake/deps.sh apt rust
COPY CMakeLists.txt ./
COPY cmake cmake
COPY stage stage
COPY controller controller
COPY tests tests
RUN cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DWITH_TORCH=OFF -DWITH_CUDA=OFF \
    && cmake --build build --target qwen-head
COPY dockerfiles/rootfs.sh dockerfiles/rootfs.sh
RUN dockerfiles/rootfs.sh /rootfs build/bin/qwen-head

FROM scratch
COPY --from=build /rootfs /
ENV PATH=/usr/local/bin
USER 65532:65532
# API, /healthz, /ready, /metrics; control channel of the stages
EXPOSE 8000 7000
ENTRYPOINT ["/usr/local/bin/qwen-head"]
