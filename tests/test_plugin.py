# SPDX-License-Identifier: Apache-2.0
"""The registration with anomalib, which every ``import torch`` starts.

Import state belongs to a process, so nearly everything here runs in a fresh one. The tests marked ``integration`` use
the real torch and anomalib and the installed entry point. The others put stand-ins for torch, anomalib and the modules
that the face imports around the plugin and a copy of the face: they take a tenth of a second each and can play an
anomalib that does not exist.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import anomalib_twostage
import anomalib_twostage_plugin

COMPLAINT = "anomalib-twostage could not make"
FACE = Path(anomalib_twostage.__file__).read_text()
PLUGIN = Path(anomalib_twostage_plugin.__file__).read_text()


def run_python(code: str, *options: str, **environment: str) -> str:
    """Run code in a fresh interpreter that must succeed, and return what it wrote to stderr."""
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    result = subprocess.run(
        [sys.executable, *options, "-c", dedent(code)],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def modules_of_the_face() -> dict[str, str]:
    """A stand-in for each module of the package that the face imports, with the names that it takes from it."""
    imports = [node for node in ast.parse(FACE).body if isinstance(node, ast.ImportFrom) and node.level]
    return {
        f"anomalib_twostage/{str(node.module).replace('.', '/')}": "\n".join(
            ["import torch", *(f"class {alias.name}: pass" for alias in node.names)]
        )
        for node in imports
    }


STAND_INS = {
    # As torch does: the end of its import calls the entry point.
    "torch": "from anomalib_twostage_plugin import register\nregister()",
    "anomalib/__init__": "__version__ = '2.7.0'",
    "anomalib/data/__init__": "import torch",
    "anomalib/engine": "import anomalib.models",
    "anomalib/metrics": "import anomalib.data\nclass Evaluator: pass",
    # torch and anomalib.data are first imported by a half-loaded anomalib.models, as in the real one.
    "anomalib/models/__init__": "import torch\nimport anomalib.data\nimport anomalib.models.image\n"
    "ALLOWED_MODULES = {'anomalib.models'}",
    "anomalib/models/image": "import anomalib.data",
    **modules_of_the_face(),
    "anomalib_twostage/data": "import anomalib.data\nclass SampleTextures: pass",
    "anomalib_twostage/model/lightning_model": "from anomalib.models import ALLOWED_MODULES\n"
    "from anomalib.metrics import Evaluator\nclass TwoStageSuperpixel: pass",
    "anomalib_twostage/__init__": FACE,
    "anomalib_twostage_plugin": PLUGIN,
}

REGISTERED = """
import sys, types, anomalib.data, anomalib.models
assert "anomalib_twostage" in sys.modules, "nothing imported it"
import anomalib_twostage
assert anomalib.models.TwoStageSuperpixel is anomalib_twostage.TwoStageSuperpixel
assert anomalib.data.SampleTextures is anomalib_twostage.SampleTextures
assert anomalib.models.ALLOWED_MODULES == {
    "anomalib.models", "anomalib_twostage", "anomalib_twostage.model.lightning_model"
}
"""
NOTHING_STAYS_BEHIND = """
import sys, types, anomalib
assert type(anomalib) is types.ModuleType
assert not [finder for finder in sys.meta_path if "anomalib" in finder.__module__]
"""


class Stage:
    """A folder with stand-ins that come first on the import path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, source in STAND_INS.items():
            self.write(name, source)

    def write(self, name: str, source: str) -> None:
        path = self.root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def run(self, code: str, *options: str) -> str:
        return run_python(code, *options, PYTHONPATH=str(self.root))

    def registers(self, code: str, *options: str) -> None:
        assert self.run(f"{dedent(code)}\n{REGISTERED}\n{NOTHING_STAYS_BEHIND}", *options) == ""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


class TestRealAnomalib:
    pytestmark = pytest.mark.integration

    def test_every_way_to_name_the_model_and_the_data(self, tmp_path: Path) -> None:
        stderr = run_python(
            f"""
            import os, sys
            os.chdir({str(tmp_path)!r})
            import torch

            assert "anomalib_twostage_plugin" in sys.modules, "is the package installed?"
            loaded = {{name.partition(".")[0] for name in sys.modules}}
            assert not loaded & {{"anomalib", "anomalib_twostage", "kornia", "lightning", "skimage"}}

            import anomalib.data
            sample_textures = anomalib.data.get_datamodule({{"class_path": "SampleTextures"}})
            import anomalib_twostage
            assert type(sample_textures) is anomalib_twostage.SampleTextures

            from anomalib.models import UnknownModelError, get_model, list_models
            assert "two_stage_superpixel" in list_models()
            assert "TwoStageSuperpixel" in list_models(case="pascal")
            for model in (
                "two_stage_superpixel",
                "TwoStageSuperpixel",
                {{"class_path": "TwoStageSuperpixel"}},
                {{"class_path": "anomalib_twostage.TwoStageSuperpixel", "init_args": {{}}}},
                {{"class_path": "anomalib_twostage.model.lightning_model.TwoStageSuperpixel"}},
            ):
                assert type(get_model(model)) is anomalib_twostage.TwoStageSuperpixel, model
            try:
                get_model({{"class_path": "anomalib_twostage.model.torch_model.TwoStageSuperpixelModel"}})
            except UnknownModelError:
                pass
            else:
                raise AssertionError("the whitelist was opened further than needed")

            from anomalib.cli import AnomalibCLI
            names = ["--model", "TwoStageSuperpixel", "--data", "SampleTextures"]
            cli = AnomalibCLI(["fit", *names], run=False)
            assert type(cli.model) is anomalib_twostage.TwoStageSuperpixel
            assert type(cli.datamodule) is anomalib_twostage.SampleTextures
            for command in ("fit", "validate", "test", "train", "predict", "export"):
                more = ["--export_type", "torch"] if command == "export" else []
                config = cli.parser.parse_args([command, *names, *more])[command]
                assert config.model.class_path == "anomalib_twostage.TwoStageSuperpixel", command
                assert config.data.class_path == "anomalib_twostage.SampleTextures", command

            from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
            model, data = {{"class_path": "TwoStageSuperpixel"}}, {{"class_path": "SampleTextures"}}
            [job] = BenchmarkJobGenerator("cpu").generate_jobs({{"seed": 0, "model": model, "data": data}}, None)
            assert type(job.model) is anomalib_twostage.TwoStageSuperpixel
            assert type(job.datamodule) is anomalib_twostage.SampleTextures

            import multiprocessing, pickle
            from anomalib_twostage import TwoStageSuperpixel
            assert pickle.loads(pickle.dumps(TwoStageSuperpixel)) is TwoStageSuperpixel
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                assert "two_stage_superpixel" in pool.apply(list_models)  # anomalib.models comes first there
                assert pool.apply(getattr, (TwoStageSuperpixel, "__name__")) == "TwoStageSuperpixel"
            """
        )
        assert COMPLAINT not in stderr

    def test_every_part_of_anomalib_first(self) -> None:
        """In forks of one process that has imported everything else, so that the parts cost their own time only."""
        stderr = run_python(
            f"""
            import importlib, os, pkgutil, torch
            import jsonargparse, kornia, lightning.pytorch, matplotlib.pyplot, pandas, skimage.segmentation, timm
            import torchvision.transforms.v2, anomalib
            ours = ["anomalib_twostage.superpixels.slic", "anomalib_twostage.inspection.preview"]
            for part in [*(f"anomalib.{{m.name}}" for m in pkgutil.iter_modules(anomalib.__path__)), *ours]:
                child = os.fork()
                if not child:
                    try:
                        importlib.import_module(part)
                        from anomalib.data import SampleTextures
                        from anomalib.models import TwoStageSuperpixel
                        exec({NOTHING_STAYS_BEHIND!r}, dict())
                    except BaseException as error:
                        print(part, "first:", repr(error), file=__import__("sys").stderr, flush=True)
                        os._exit(1)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0, part
            """
        )
        assert COMPLAINT not in stderr

    def test_autoload_off(self) -> None:
        stderr = run_python(
            """
            import sys, torch
            assert "anomalib_twostage_plugin" not in sys.modules
            from anomalib_twostage import TwoStageSuperpixelModel
            from anomalib.models import list_models
            assert "two_stage_superpixel" in list_models()
            """,
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )
        assert COMPLAINT not in stderr


class TestOrders:
    """Whatever is imported first, both names end up registered and nothing stays behind."""

    @pytest.mark.parametrize(
        "first",
        [
            "torch, anomalib.models",
            "anomalib, anomalib.data",
            "anomalib.models",
            "anomalib.data",
            "anomalib.metrics",
            "anomalib.models.image",
            "anomalib.engine",
            "anomalib_twostage",
            "anomalib_twostage.data",
            "anomalib_twostage.model.lightning_model",
            "anomalib_twostage.superpixels.slic",
        ],
    )
    def test_first_import(self, stage: Stage, first: str) -> None:
        stage.registers(f"import {first}")

    @pytest.mark.parametrize(
        "code", ["import anomalib.models, anomalib_twostage", "import anomalib_twostage", "import anomalib.data, torch"]
    )
    def test_without_the_entry_point(self, stage: Stage, code: str) -> None:
        stage.write("torch", "")
        stage.registers(code.replace("torch", "anomalib_twostage_plugin; anomalib_twostage_plugin.register()"))

    def test_only_what_the_program_imports_is_imported(self, stage: Stage) -> None:
        code = "import sys, torch, anomalib\nassert not {'anomalib.data', 'anomalib_twostage'} & set(sys.modules)"
        assert stage.run(code) == ""

    def test_threads(self, stage: Stage) -> None:
        """One imports the package while another is in the middle of anomalib.models."""
        stage.write("anomalib/models/image", "import sys\nsys.in_models.set()\nsys.in_package.wait(5)")
        data = STAND_INS["anomalib_twostage/data"]
        stage.write("anomalib_twostage/data", f"import sys\nsys.in_package.set()\n{data}")
        stage.registers(
            """
            import sys, threading, torch
            sys.in_models, sys.in_package = threading.Event(), threading.Event()
            def load_package():
                sys.in_models.wait(5)
                import anomalib_twostage
            thread = threading.Thread(target=load_package)
            thread.start()
            import anomalib.models
            thread.join()
            """
        )

    def test_repeated_registration(self, stage: Stage) -> None:
        stage.registers(
            """
            import sys
            from anomalib_twostage_plugin import register
            register()
            finders = len(sys.meta_path)
            register(), register()
            assert len(sys.meta_path) == finders
            import anomalib.models
            model, loaded = anomalib.models.TwoStageSuperpixel, set(sys.modules)
            register(), register()
            assert anomalib.models.TwoStageSuperpixel is model
            assert set(sys.modules) == loaded
            """
        )

    def test_a_name_anomalib_has_itself_is_kept(self, stage: Stage) -> None:
        stage.write("anomalib/data/__init__", "SampleTextures = 'their own'")
        assert stage.run("import torch, anomalib.data\nassert anomalib.data.SampleTextures == 'their own'") == ""


class TestImportSystem:
    """The import system's own tools see nothing unusual."""

    def test_find_spec_imports_nothing(self, stage: Stage) -> None:
        stage.registers(
            """
            import importlib.util, sys, torch
            spec = importlib.util.find_spec("anomalib.models")
            assert type(spec.loader).__name__ == "SourceFileLoader"
            assert "anomalib.models" not in sys.modules
            import anomalib.models
            """
        )

    def test_specs_and_loaders(self, stage: Stage) -> None:
        stage.run(
            """
            import importlib.resources, inspect, sys, torch
            import anomalib.models
            for name in ("anomalib", "anomalib.models", "anomalib.data", "anomalib_twostage"):
                module = sys.modules[name]
                assert type(module.__loader__).__name__ == "SourceFileLoader"
                assert module.__spec__.loader is module.__loader__
                source = importlib.resources.files(name).joinpath("__init__.py").read_text()
                assert source.strip() == inspect.getsource(module).strip()
            """
        )

    def test_reload(self, stage: Stage) -> None:
        stage.registers(
            """
            import importlib, torch
            import anomalib.models, anomalib_twostage, anomalib_twostage_plugin
            for module in (anomalib.models, anomalib, anomalib_twostage_plugin, anomalib_twostage):
                assert importlib.reload(module) is module
            """
        )

    def test_run_as_script(self, stage: Stage) -> None:
        stage.write("anomalib/__main__", "import anomalib.models\nassert anomalib.models.TwoStageSuperpixel")
        stage.run("import runpy, torch\nrunpy.run_module('anomalib', run_name='__main__')")

    def test_anomalib_is_pickled_by_name_while_it_is_watched(self, stage: Stage) -> None:
        """Plain pickle refuses modules, cloudpickle takes plain ones; it must take this one too."""
        stage.write("anomalib/version", "")
        stage.run(
            """
            import pickle, torch, anomalib.version
            assert pickle.loads(pickle.dumps(anomalib)) is anomalib
            """
        )


class TestStepsAside:
    """No anomalib, however strange, makes an import fail, and there is one warning at most."""

    CODE = "import torch, anomalib.models, anomalib.data, anomalib.engine, anomalib_twostage_plugin"

    def complains_once(self, stage: Stage, *reasons: str) -> None:
        stderr = stage.run(f"{self.CODE}\nanomalib_twostage_plugin.register()\n{NOTHING_STAYS_BEHIND}")
        assert stderr.count(COMPLAINT) == 1
        for reason in (*reasons, 'pip install "anomalib>=2.7,<2.8"', "came from", "UserWarning"):
            assert reason in stderr

    def test_older_anomalib(self, stage: Stage) -> None:
        stage.write("anomalib/__init__", "__version__ = '2.6.0'")
        stage.write("anomalib/models/__init__", "import torch\nALLOWED = ()")
        stage.write("anomalib_twostage/model/lightning_model", "class TwoStageSuperpixel: pass")
        self.complains_once(stage, "anomalib 2.6.0", "ALLOWED_MODULES")

    def test_whitelist_of_another_kind(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch\nALLOWED_MODULES = ('anomalib.models',)")
        self.complains_once(stage, "update")

    @pytest.mark.parametrize("module", ["model/lightning_model", "data"])
    def test_module_that_cannot_be_imported(self, stage: Stage, module: str) -> None:
        stage.write(f"anomalib_twostage/{module}", "raise RuntimeError('broken on purpose')")
        self.complains_once(stage, "RuntimeError: broken on purpose")

    def test_a_name_that_another_anomalib_lacks(self, stage: Stage) -> None:
        stage.write("anomalib/metrics", "import anomalib.data")
        self.complains_once(stage, "ImportError", "Evaluator")

    def test_anomalib_with_a_module_class_of_its_own(self, stage: Stage) -> None:
        source = "import sys, types\nclass Own(types.ModuleType): pass\nsys.modules[__name__].__class__ = Own"
        stage.write("anomalib/__init__", source)
        stderr = stage.run(self.CODE)
        assert stderr.count(COMPLAINT) == 1
        assert "Own" in stderr
        assert "of unknown version" in stderr

    def test_warnings_as_errors(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch")
        stderr = stage.run(self.CODE, "-W", "error")
        assert stderr.count(COMPLAINT) == 1

    def test_no_anomalib(self, stage: Stage) -> None:
        assert stage.run("import sys\nsys.modules['anomalib'] = None\nimport torch") == ""

    def test_an_import_error_of_anomalib_stays_its_own(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch\nimport anomalib.data\nraise ValueError('theirs')")
        stage.run(
            """
            try:
                import anomalib.models
            except ValueError as error:
                assert str(error) == "theirs"
            """
        )

    def test_an_import_error_of_the_face_reaches_who_imports_it(self, stage: Stage) -> None:
        stage.write("anomalib_twostage/model/loss", "raise RuntimeError('broken on purpose')")
        stage.run(
            """
            try:
                import anomalib_twostage
            except RuntimeError as error:
                assert str(error) == "broken on purpose"
            else:
                raise AssertionError("no error")
            """
        )


def test_the_plugin_needs_the_standard_library_only() -> None:
    run_python(
        """
        import sys
        before = {name.partition(".")[0] for name in sys.modules}
        import anomalib_twostage_plugin
        after = {name.partition(".")[0] for name in sys.modules}
        assert after - before <= sys.stdlib_module_names | {"anomalib_twostage_plugin"}, after - before
        assert "importlib.metadata" not in sys.modules
        """
    )


def test_the_face_has_what_it_names() -> None:
    for name in anomalib_twostage.__all__:
        assert getattr(anomalib_twostage, name) is not None
    assert anomalib_twostage.__version__[0].isdigit()
