"""The site beside the repository: README is its first page, and figures of benchmarks are part of it."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_files(files, config):
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for path in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace("](../benchmarks/", "](benchmarks/")
