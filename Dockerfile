# One image for the API and the worker. The CUDA build of torch brings its own libraries; the host needs the
# NVIDIA driver and container toolkit, or no GPU at all.
# For several machines: docker build --build-arg EXTRAS=server,remote,postgres,s3,ray .
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    TUNEPROOF_DATA_DIR=/data

# Named volumes take over the owner of the folder that they are mounted on.
RUN useradd --create-home --uid 10001 tuneproof \
    && install --directory --owner tuneproof --group tuneproof \
        /data /home/tuneproof/.cache /home/tuneproof/.cache/huggingface

WORKDIR /app

# Of pyproject.toml, by commas.
ARG EXTRAS=server,remote

# The packages first: a layer of gigabytes that a change of our own code leaves alone.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
asked = [line for name in '${EXTRAS}'.split(',') for line in extras[name]]; \
print(*project['dependencies'], *asked, sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY tuneproof tuneproof
COPY service service
COPY worker worker
COPY migrations migrations
COPY examples examples
RUN pip install --no-deps --constraint constraints.txt ".[${EXTRAS}]"

WORKDIR /home/tuneproof
USER tuneproof
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('TUNEPROOF_PORT', '8000') + '/healthz', timeout=4)"]

ENTRYPOINT ["tuneproof"]
CMD ["serve"]
