"""The release: a tag is published only if it is the version."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import moejax

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


@pytest.mark.skipif(not WORKFLOW.exists(), reason="no workflows beside these tests")
@pytest.mark.parametrize(("tag", "code"), [(f"v{moejax.__version__}", 0), ("v9.9.9", 1)])
def test_the_tag_is_the_version(tag, code):
    [check] = re.findall(r"run: (grep .*)", WORKFLOW.read_text())
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment).returncode == code
