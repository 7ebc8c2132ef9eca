"""The checks of deploy/smoke.py on a published model: it is downloaded once, checked, exported and served."""

from smoke_tools import Project, computed, expect, noise

NAME = "dinov2_vits14"
WEIGHTS = {
    "DINOV2_MODEL": NAME,
    "DINOV2_META_URL": "http://weights:9000/meta",  # has no file, so that the second server is used
    "DINOV2_HUGGING_FACE_URL": "http://weights:9000/hf",
}


def downloads(project: Project) -> int:
    """Return how often the server of weights has sent the file."""
    code = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9000/count').read().decode())"
    return int(project.inside("weights", "python", "-c", code))


def check_published(port: int, keep: bool) -> None:
    """Check `DINOV2_MODEL=dinov2_vits14 docker compose up --wait` with a local server of random weights."""
    project = Project("dinov2-smoke-published", port, WEIGHTS, profiles=("published",))
    try:
        project.up("weights")
        seconds = project.up("service")
        ready = project.service.get("/readyz")
        about = f"after {seconds:.1f} s, {ready['model']}, fingerprint {ready['fingerprint'][:8]}"
        expect("a published model is downloaded, checked, exported and served", ready["model"].startswith(NAME), about)
        expect("it is downloaded once", downloads(project) == 1, "1 download")
        image = noise()
        first = project.service.embed(image)
        vector = first["data"][0]["embedding"]
        expect("it embeds an image", len(vector) == 384, f"{len(vector)} numbers, computed: {computed(first)}")
        for action, arguments in (
            ("a restart", ("restart", "service")),
            ("a new container", ("up", "-d", "--no-build", "--force-recreate", "--no-deps", "--wait", "service")),
        ):
            before = project.container("service")
            project.compose(*arguments)
            seconds = project.up("service")
            again = project.service.embed(image)
            same = again["data"][0]["embedding"] == vector and project.service.get("/readyz") == ready
            other = project.container("service") != before
            expect(f"after {action}, the same model answers the same", same, f"new container: {other}")
            expect(f"after {action}, nothing was downloaded", downloads(project) == 1)
    finally:
        if not keep:
            project.remove()
