"""Clients that are generated from the OpenAPI document work against a running service, and requests that are generated
from it never get an answer that it does not declare.

The generators are not among the packages of the extra `test`, because their dependencies conflict with newer versions
that other packages use. A test is skipped if its generator is not on the PATH:

    python -m venv generators && generators/bin/pip install openapi-python-client schemathesis
    npm install --prefix generators openapi-typescript openapi-fetch typescript@5
    export PATH=$PWD/generators/bin:$PWD/generators/node_modules/.bin:$PATH
    python -m pytest tests/service/test_generated_clients.py
"""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes import photo
from tests.service.test_server import Server

CONFIG = 'content_type_overrides: {"image/*": application/octet-stream}\n'  # as in docs/api.md

PYTHON = """
import base64, sys
from dinov2_service_client import Client
from dinov2_service_client.api.collections import get_collection, put_collection
from dinov2_service_client.api.embeddings import create_embeddings
from dinov2_service_client.api.items import add_items, count_items
from dinov2_service_client.api.models import list_models
from dinov2_service_client.api.search import search
from dinov2_service_client.models import (
    AddItemsFilesBody, CollectionIn, CountIn, EmbeddingsIn, FilterIn, ItemIn, ItemInMetadataType0, ItemsIn, OpenAIError,
    Problem, SearchAnswer, SearchIn,
)
from dinov2_service_client.types import File

client = Client(base_url=sys.argv[1])
image = open(sys.argv[2], "rb")
url = "data:image/png;base64," + base64.b64encode(image.read()).decode()
model = list_models.sync(client=client).data[0]
assert model.created > 0 and model.dimensions > 0
answer = create_embeddings.sync(client=client, body=EmbeddingsIn(input_=[url, url]))
assert len(answer.data) == 2 and len(answer.data[0].embedding) == model.dimensions
image.seek(0)
raw = create_embeddings.sync(client=client, body=File(payload=image))
assert raw.data[0].embedding == answer.data[0].embedding
created = put_collection.sync_detailed("generated", client=client, body=CollectionIn(indexed=["n"]))
assert created.status_code == 201 and created.parsed.count == 0
items = [ItemIn(id=f"p{n}", image=url, metadata=ItemInMetadataType0.from_dict({"n": n})) for n in range(3)]
added = add_items.sync("generated", client=client, body=ItemsIn(items=items), idempotency_key="one")
assert added.count == 3, added
image.seek(0)
form = AddItemsFilesBody(file=[File(payload=image, file_name="a.png")])
assert add_items.sync("generated", client=client, body=form).count == 4
assert get_collection.sync("generated", client=client).count == 4
assert count_items.sync("generated", client=client, body=CountIn(filter_=FilterIn(key="n", gte=1))).count == 2
query = SearchIn(image=url, k=2, filter_=FilterIn(not_=FilterIn(key="n", eq=0)))
found = search.sync("generated", client=client, body=query)
assert isinstance(found, SearchAnswer), found
assert [round(hit.score, 3) for hit in found.data] == [1.0, 1.0], found
problem = get_collection.sync("nothing", client=client)
assert isinstance(problem, Problem) and problem.code == "collection_not_found"
refused = create_embeddings.sync(client=client, body=EmbeddingsIn(input_="a red shoe"))
assert isinstance(refused, OpenAIError) and "not text" in refused.error.message
print("done")
"""

TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { paths } from "./dinov2";

declare const process: { argv: string[] };

const client = createClient<paths>({ baseUrl: process.argv[2] });
const image = process.argv[3];

function check(value: boolean, what: string): void {
  if (!value) throw new Error(what);
}

async function main(): Promise<void> {
  const embedded = await client.POST("/v1/embeddings", { body: { input: image } });
  check(embedded.data!.data[0].embedding.length > 0, "embedding");
  const path = { name: "typed" };
  const created = await client.PUT("/v1/collections/{name}", { params: { path }, body: { pooling: "cls" } });
  check(created.response.status === 201 && created.data!.count === 0, "create");
  const items = { items: [{ id: "p1", image, metadata: { n: 1 } }] };
  const added = await client.POST("/v1/collections/{name}/items", { params: { path }, body: items });
  check(added.data!.count === 1, "add");
  const query = { image, k: 1, filter: { key: "n", eq: 1 } };
  const found = await client.POST("/v1/collections/{name}/search", { params: { path }, body: query });
  check(found.data!.data![0].id === "p1", "search");
  const missing = await client.GET("/v1/collections/{name}", { params: { path: { name: "nothing" } } });
  check(missing.error!.code === "collection_not_found", "problem");
  const refused = await client.POST("/v1/embeddings", { body: { input: "a red shoe" } });
  check(refused.error!.error.message.includes("not text"), "text");
  console.log("done");
}

main();
"""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not on the PATH")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0


@pytest.fixture
def document(server: Server, tmp_path: Path) -> Path:
    path = tmp_path / "openapi.json"
    path.write_bytes(httpx.get(f"{server.url}/openapi.json").content)
    return path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program and return its output. Fail if the program fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs("openapi-python-client")
def test_a_generated_python_client(server, document, tmp_path):
    (tmp_path / "config.yml").write_text(CONFIG)
    (tmp_path / "image.png").write_bytes(photo())
    words = ("--path", document, "--config", "config.yml", "--output-path", tmp_path / "client", "--meta", "setup")
    said = run("openapi-python-client", "generate", *words, "--fail-on-warning", cwd=tmp_path)
    assert "WARNING" not in said.upper()
    path = os.pathsep.join(filter(None, [str(tmp_path / "client"), os.environ.get("PYTHONPATH")]))
    said = run(
        sys.executable,
        "-W",
        "error::SyntaxWarning",
        "-c",
        PYTHON,
        server.url,
        "image.png",
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert said == "done\n"


@needs("openapi-typescript")
def test_a_generated_typescript_client(server, document, tmp_path):
    generator = Path(shutil.which("openapi-typescript") or "")
    said = run(generator, document, "-o", tmp_path / "dinov2.d.ts", cwd=tmp_path)
    assert "warn" not in said.lower()
    compiler, modules = generator.parent / "tsc", generator.parents[1]
    if not compiler.exists() or not (modules / "openapi-fetch").exists():
        pytest.skip("typescript and openapi-fetch are not installed next to openapi-typescript")
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "client.mts").write_text(TYPESCRIPT.replace("./dinov2", "./dinov2.d.ts"))
    options = ("--strict", "--target", "es2022", "--module", "nodenext", "--skipLibCheck", "--lib", "es2022,dom")
    run(compiler, *options, "client.mts", cwd=tmp_path)
    url = "data:image/png;base64," + base64.b64encode(photo()).decode()
    assert run("node", "client.mjs", server.url, url, cwd=tmp_path) == "done\n"


@needs("schemathesis")
def test_generated_requests_get_declared_answers_only(server, tmp_path):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    said = run(
        *("schemathesis", "run", f"{server.url}/openapi.json", "--checks", checks, "--seed", "1"),
        *("--max-examples", "10", "--phases", "coverage,fuzzing"),
        cwd=tmp_path,
    )
    assert "passed" in said
