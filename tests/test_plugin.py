# SPDX-License-Identifier: Apache-2.0
"""The registration with anomalib, and the package face, which every ``import torch`` loads.

Import state belongs to a process, so nearly everything here runs in a fresh one. The tests marked ``integration`` use
the real torch and anomalib and the installed entry point. The others put stand-ins for torch, anomalib and the heavy
modules of this package around copies of ``__init__.py`` and ``plugin.py``: they take a tenth of a second each and can
play an anomalib that does not exist.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import anomalib_twostage

COMPLAINT = "anomalib-twostage could not make"


def run_python(code: str, *options: str, **environment: str) -> str:
    """Run code in a fresh interpreter that must succeed, and return what it wrote to stderr."""
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    result = subprocess.run(
        [sys.executable, *options, "-c", dedent(code)],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


STAND_INS = {
    # As torch does: the end of its import calls the entry point.
    "torch": "from anomalib_twostage.plugin import register\nregister()",
    "anomalib/__init__": "__version__ = '2.7.0'",
    "anomalib/data/__init__": "import torch",
    "anomalib/engine": "import anomalib.models",
    # torch and anomalib.data are first imported by a half-loaded anomalib.models, as in the real one.
    "anomalib/models/__init__": "import torch\nimport anomalib.data\nimport anomalib.models.image\n"
    "ALLOWED_MODULES = {'anomalib.models'}",
    "anomalib/models/image": "import anomalib.data",
    "anomalib_twostage/data": "import anomalib.data\nclass SampleTextures: pass",
    "anomalib_twostage/torch_model": "import anomalib.models\nclass TwoStageSuperpixelModel: pass",
    "anomalib_twostage/lightning_model": "import anomalib.models\n"
    "from .torch_model import TwoStageSuperpixelModel\nclass TwoStageSuperpixel: pass",
    "anomalib_twostage/slic": "import torch\nclass Slic: pass\ndef slic(): pass",
}

REGISTERED = """
import sys, types, anomalib_twostage, anomalib.data, anomalib.models
assert anomalib.models.TwoStageSuperpixel is anomalib_twostage.TwoStageSuperpixel
assert anomalib.data.SampleTextures is anomalib_twostage.SampleTextures
assert anomalib.models.ALLOWED_MODULES == {
    "anomalib.models", "anomalib_twostage", "anomalib_twostage.model.lightning_model"
}
assert type(anomalib) is types.ModuleType
assert not [finder for finder in sys.meta_path if "anomalib" in finder.__module__]
"""


class Stage:
    """A folder with stand-ins that come first on the import path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, source in STAND_INS.items():
            self.write(name, source)
        package = Path(anomalib_twostage.__file__).parent
        for name in ("__init__.py", "plugin.py"):
            shutil.copy(package / name, root / "anomalib_twostage" / name)

    def write(self, name: str, source: str) -> None:
        path = self.root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def run(self, code: str, *options: str) -> str:
        return run_python(code, *options, PYTHONPATH=str(self.root))

    def registers(self, code: str, *options: str) -> None:
        assert self.run(f"{dedent(code)}\n{REGISTERED}", *options) == ""


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

            assert "anomalib_twostage.plugin" in sys.modules, "is the package installed?"
            assert not [name for name in sys.modules if name.partition(".")[0] in ("anomalib", "kornia", "skimage")]
            assert {{name for name in sys.modules if name.startswith("anomalib_twostage.")}} == {{
                "anomalib_twostage.plugin"
            }}

            import anomalib.data
            assert "anomalib.models" not in sys.modules
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

            for name in anomalib_twostage.__all__:
                assert getattr(anomalib_twostage, name) is not None
            """
        )
        assert COMPLAINT not in stderr

    def test_anomalib_first_and_spawned_workers(self) -> None:
        """Torch is first imported by a half-loaded anomalib.models, and a spawned process starts all over."""
        stderr = run_python(
            """
            from anomalib.models import list_models
            assert "two_stage_superpixel" in list_models()

            import multiprocessing, pickle
            from anomalib_twostage import TwoStageSuperpixel
            assert pickle.loads(pickle.dumps(TwoStageSuperpixel)) is TwoStageSuperpixel
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                assert "two_stage_superpixel" in pool.apply(list_models)
                assert pool.apply(getattr, (TwoStageSuperpixel, "__name__")) == "TwoStageSuperpixel"
            """
        )
        assert COMPLAINT not in stderr

    def test_autoload_off(self) -> None:
        stderr = run_python(
            """
            import sys, torch
            assert "anomalib_twostage" not in sys.modules
            from anomalib_twostage import TwoStageSuperpixelModel
            from anomalib.models import list_models
            assert "two_stage_superpixel" in list_models()
            """,
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )
        assert COMPLAINT not in stderr

    def test_model_that_cannot_be_imported(self) -> None:
        stderr = run_python(
            """
            import sys
            sys.modules["anomalib_twostage.model.lightning_model"] = None
            import anomalib.engine
            from anomalib.models import Padim, list_models
            assert "padim" in list_models()
            assert "two_stage_superpixel" not in list_models()
            """
        )
        assert stderr.count(COMPLAINT) == 1

    def test_stock_command(self, tmp_path: Path) -> None:
        command = Path(sys.executable).with_name("anomalib")
        result = subprocess.run(
            [command, "train", "--model.help", "TwoStageSuperpixel"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "anomalib_twostage.TwoStageSuperpixel" in result.stdout


class TestOrders:
    """Whatever is imported first, both names end up registered and nothing stays behind."""

    @pytest.mark.parametrize(
        "first",
        [
            "torch",
            "anomalib",
            "anomalib.models",
            "anomalib.data",
            "anomalib.models.image",
            "anomalib.engine",
            "anomalib_twostage",
            "anomalib_twostage.data",
            "anomalib_twostage.model.lightning_model",
            "anomalib_twostage.model.torch_model",
            "anomalib_twostage.superpixels.slic",
        ],
    )
    def test_first_import(self, stage: Stage, first: str) -> None:
        stage.registers(f"import {first}")

    def test_anomalib_before_the_plugin(self, stage: Stage) -> None:
        stage.write("torch", "")
        stage.registers("import anomalib.models, anomalib_twostage")

    def test_data_alone(self, stage: Stage) -> None:
        stage.run(
            """
            import sys, anomalib.data
            assert anomalib.data.SampleTextures
            assert "anomalib.models" not in sys.modules
            """
        )

    def test_two_threads(self, stage: Stage) -> None:
        stage.write("anomalib/models/image", "import time\ntime.sleep(0.2)")
        stage.registers(
            """
            import threading
            threads = [
                threading.Thread(target=__import__, args=(name,))
                for name in ("anomalib_twostage.model.torch_model", "anomalib.models", "anomalib_twostage")
            ]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            """
        )

    def test_repeated_registration(self, stage: Stage) -> None:
        stage.registers(
            """
            import sys
            from anomalib_twostage.plugin import register
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
        stage.run(
            """
            import importlib, torch
            import anomalib.models, anomalib_twostage.plugin
            for module in (anomalib.models, anomalib, anomalib_twostage.plugin, anomalib_twostage):
                assert importlib.reload(module) is module
            assert anomalib.models.TwoStageSuperpixel
            from anomalib_twostage import slic
            assert callable(slic)
            """
        )

    def test_run_as_script(self, stage: Stage) -> None:
        stage.write("anomalib/__main__", "import anomalib.models\nassert anomalib.models.TwoStageSuperpixel")
        stage.run("import runpy, torch\nrunpy.run_module('anomalib', run_name='__main__')")

    def test_packages_are_pickled_by_name(self, stage: Stage) -> None:
        """Plain pickle refuses modules, cloudpickle takes plain ones; it must take these, waiting or not."""
        stage.run(
            """
            import pickle, anomalib_twostage
            import anomalib.data
            for module in (anomalib, anomalib_twostage):
                assert pickle.loads(pickle.dumps(module)) is module
            """
        )


class TestStepsAside:
    """No anomalib, however strange, makes an import fail, and there is one warning at most."""

    CODE = "import torch, anomalib.models, anomalib.data, anomalib.engine, anomalib_twostage"

    def complains_once(self, stage: Stage, *reasons: str) -> None:
        stderr = stage.run(f"{self.CODE}\nanomalib_twostage.plugin.register()")
        assert stderr.count(COMPLAINT) == 1
        for reason in (*reasons, "pip install --upgrade", "UserWarning"):
            assert reason in stderr

    def test_older_anomalib(self, stage: Stage) -> None:
        stage.write("anomalib/__init__", "__version__ = '2.6.0'")
        stage.write("anomalib/models/__init__", "import torch")
        self.complains_once(stage, "anomalib 2.6.0", "ALLOWED_MODULES")

    def test_whitelist_of_another_kind(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch\nALLOWED_MODULES = ('anomalib.models',)")
        self.complains_once(stage, "update")

    @pytest.mark.parametrize("module", ["lightning_model", "data"])
    def test_module_that_cannot_be_imported(self, stage: Stage, module: str) -> None:
        stage.write(f"anomalib_twostage/{module}", "raise RuntimeError('broken on purpose')")
        self.complains_once(stage, "RuntimeError: broken on purpose")

    def test_both_cannot_be_imported(self, stage: Stage) -> None:
        for module in ("lightning_model", "data"):
            stage.write(f"anomalib_twostage/{module}", "from anomalib.data import " + module)
        self.complains_once(stage, "ImportError")

    def test_anomalib_with_a_module_class_of_its_own(self, stage: Stage) -> None:
        source = "import sys, types\nclass Own(types.ModuleType): pass\nsys.modules[__name__].__class__ = Own"
        stage.write("anomalib/__init__", source)
        self.complains_once(stage, "Own", "of unknown version")

    def test_warnings_as_errors(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch")
        stderr = stage.run(self.CODE, "-W", "error")
        assert stderr.count(COMPLAINT) == 1

    def test_nothing_stays_behind(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch")
        stage.run(
            f"""
            {self.CODE}
            import sys, types
            assert type(anomalib) is types.ModuleType
            assert not [finder for finder in sys.meta_path if "anomalib" in finder.__module__]
            """,
        )

    def test_no_anomalib(self, stage: Stage) -> None:
        shutil.rmtree(stage.root / "anomalib")
        stderr = stage.run(
            "import sys\nsys.modules['anomalib'] = None\nimport torch\nfrom anomalib_twostage import slic"
        )
        assert stderr == ""

    def test_an_import_error_of_anomalib_stays_its_own(self, stage: Stage) -> None:
        stage.write("anomalib/models/__init__", "import torch\nimport anomalib.data\nraise ValueError('theirs')")
        stderr = stage.run(
            """
            try:
                import anomalib.models
            except ValueError as error:
                assert str(error) == "theirs"
            """
        )
        assert stderr == ""


class TestFace:
    @pytest.mark.parametrize("module", ["anomalib_twostage", "anomalib_twostage.plugin"])
    def test_needs_the_standard_library_only(self, module: str) -> None:
        run_python(
            f"""
            import sys
            before = {{name.partition(".")[0] for name in sys.modules}}
            import {module}
            after = {{name.partition(".")[0] for name in sys.modules}}
            assert after - before <= sys.stdlib_module_names | {{"anomalib_twostage"}}, after - before
            assert "importlib.metadata" not in sys.modules
            """
        )

    @pytest.mark.parametrize(
        "before",
        [
            "",
            "import anomalib_twostage.superpixels.slic",
            "from anomalib_twostage.superpixels.slic import Slic",
            "from anomalib_twostage import Slic",
            "from anomalib_twostage import slic; import anomalib_twostage.superpixels.slic",
            "import importlib; importlib.import_module('anomalib_twostage.superpixels.slic')",
        ],
    )
    def test_slic_is_the_function(self, stage: Stage, before: str) -> None:
        stage.run(
            f"""
            {before}
            from anomalib_twostage import slic
            import anomalib_twostage, sys, types
            assert type(slic) is types.FunctionType
            assert anomalib_twostage.superpixels.slic is slic is sys.modules["anomalib_twostage.superpixels.slic"].slic
            """
        )

    def test_names(self) -> None:
        assert set(anomalib_twostage.__all__) == {*anomalib_twostage._SUBMODULES, "__version__"}
        assert set(anomalib_twostage.__all__) <= set(dir(anomalib_twostage))
        assert anomalib_twostage.__version__[0].isdigit()
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = anomalib_twostage.nothing
