"""Names and idioms of programs written for the original library."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import backpack as library
from backpack import backpack, convert_module_to_backpack, extend, extensions, memory_cleanup
from backpack.context import CTX
from backpack.core.derivatives.convnd import weight_jac_t_save_memory
from backpack.extensions import BatchGrad, DiagGGNExact
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension

SURFACE = {
    "backpack": """
        CTX backpack context convert_module_to_backpack disable extend extensions memory_cleanup optim
        __version__""",
    "backpack.context": "CTX",
    "backpack.core.derivatives.convnd": "weight_jac_t_save_memory",
    "backpack.custom_module.branching": "Parallel SumModule",
    "backpack.custom_module.graph_utils": "BackpackTracer convert_module_to_backpack",
    "backpack.custom_module.pad": "Pad",
    "backpack.custom_module.permute": "Permute",
    "backpack.custom_module.reduce_tuple": "ReduceTuple",
    "backpack.custom_module.scale_module": "ScaleModule",
    "backpack.custom_module.slicing": "Slicing",
    "backpack.extensions": """
        BatchDiagGGNExact BatchDiagGGNMC BatchDiagHessian BatchGrad BatchL2Grad DiagGGNExact
        DiagGGNMC DiagHessian GGNMP HBP HMP KFAC KFLR KFRA PCHMP SqrtGGNExact SqrtGGNMC
        SumGradSquared Variance""",
    "backpack.extensions.backprop_extension": "BackpropExtension FAIL_ERROR FAIL_SILENT FAIL_WARN",
    "backpack.extensions.curvature": "Curvature",
    "backpack.extensions.firstorder": "BatchGrad BatchL2Grad SumGradSquared Variance",
    "backpack.extensions.curvmatprod": "GGNMP HMP PCHMP",
    "backpack.extensions.firstorder.batch_grad": "BatchGrad",
    "backpack.extensions.firstorder.batch_l2_grad": "BatchL2Grad",
    "backpack.extensions.firstorder.sum_grad_squared": "SumGradSquared",
    "backpack.extensions.firstorder.variance": "Variance",
    "backpack.extensions.firstorder.base": "FirstOrderBackpropExtension FirstOrderModuleExtension",
    "backpack.extensions.module_extension": "ModuleExtension",
    "backpack.extensions.secondorder": """
        BatchDiagGGNExact BatchDiagGGNMC BatchDiagHessian DiagGGNExact DiagGGNMC DiagHessian HBP KFAC
        KFLR KFRA SqrtGGNExact SqrtGGNMC""",
    "backpack.extensions.secondorder.base": "SecondOrderBackpropExtension",
    "backpack.extensions.secondorder.diag_ggn": "BatchDiagGGNExact DiagGGNExact DiagGGNMC",
    "backpack.extensions.secondorder.diag_hessian": "BatchDiagHessian DiagHessian",
    "backpack.extensions.secondorder.hbp": """
        BackpropStrategy ExpectationApproximation HBP KFAC KFLR KFRA LossHessianStrategy""",
    "backpack.extensions.secondorder.sqrt_ggn": "SqrtGGNExact SqrtGGNMC",
    "backpack.hessianfree.ggnvp": "ggn_vector_product ggn_vector_product_from_plist",
    "backpack.hessianfree.hvp": "hessian_vector_product",
    "backpack.hessianfree.lop": "L_op transposed_jacobian_vector_product",
    "backpack.hessianfree.rop": "R_op jacobian_vector_product",
    "backpack.utils": "kroneckers",
    "backpack.utils.convert_parameters": "vector_to_parameter_list",
    "backpack.utils.examples": """
        autograd_diag_ggn_exact get_mnist_dataloader load_one_batch_mnist""",
    "backpack.utils.kroneckers": """
        apply_kfac_mat_prod inv_kfacs is_matrix is_vector kfacs_to_mat two_kfacs_to_mat""",
    "backpack.utils.module_classification": "is_loss is_nll is_no_op",
    "backpack.utils.subsampling": "subsample",
}


@pytest.mark.parametrize("module", SURFACE)
def test_names_import(module: str) -> None:
    exec(f"from {module} import {', '.join(SURFACE[module].split())}", {})


def test_one_class_per_name() -> None:
    """However a class is imported, it is the same one (programs compare classes)."""
    for module, names in SURFACE.items():
        for name in names.split():
            if module.startswith("backpack.extensions.") and hasattr(extensions, name):
                assert getattr(import_module(module), name) is getattr(extensions, name)


@pytest.mark.parametrize("name", ["HBP"])
def test_names_without_meaning_say_what_to_use(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} does not exist here: .*KFLR"):
        getattr(extensions, name)("ggn", "exact", "sqrt", "average", savefield="hbp")


@pytest.mark.parametrize("base", [ModuleExtension, FirstOrderModuleExtension])
def test_extensions_per_module_say_what_to_do(base: type) -> None:
    class ScaleBatchGrad(base):
        def weight(self, ext, module, g_inp, g_out, quantities):
            return g_out[0]

    with pytest.raises(NotImplementedError, match="ScaleBatchGrad: .*subclass of .*BackpropExtension"):
        ScaleBatchGrad(params=["weight"])


def _problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return (
        extend(model),
        extend(nn.CrossEntropyLoss()),
        torch.rand(5, 1, 4, 4),
        torch.tensor([0, 1, 2] * 2)[:5],
    )


def test_context_reports_the_innermost_block() -> None:
    model, lossfunc, X, y = _problem()
    assert CTX.get_active_exts() == ()
    assert not CTX.get_debug() and not CTX.get_retain_graph() and not CTX.is_extension_active(BatchGrad)
    seen = []

    def hook(module: nn.Module) -> None:
        seen.append(CTX.is_extension_active(BatchGrad))

    exts = BatchGrad(), DiagGGNExact()
    with backpack(*exts, extension_hook=hook, retain_graph=True):
        assert CTX.get_active_exts() == exts
        assert CTX.get_extension_hook() is hook
        assert CTX.get_retain_graph()
        with pytest.warns(UserWarning, match="no backward pass ran"), backpack(DiagGGNExact()):
            assert not CTX.is_extension_active(BatchGrad)
            assert CTX.is_extension_active(BatchGrad, DiagGGNExact)
            CTX.get_extension_hook()(model)
        lossfunc(model(X), y).backward()
    assert seen and all(seen)
    assert CTX.get_active_exts() == ()


def test_save_memory_switch_changes_nothing() -> None:
    model, lossfunc, X, y = _problem()
    grads = []
    for save_memory in (True, False):
        with backpack(BatchGrad()), weight_jac_t_save_memory(save_memory=save_memory):
            lossfunc(model(X), y).backward()
        grads.append(model[0].weight.grad_batch)
    assert torch.equal(*grads)


def _switch_off(module: nn.Module) -> None:
    for child in module.children():
        _switch_off(child)
    module._backpack_extend = False
    memory_cleanup(module)


def test_clean_up_and_extend_again() -> None:
    """Some programs take the mark off by hand, clean up, and extend again later."""
    model, lossfunc, X, y = _problem()
    with backpack(DiagGGNExact()):
        lossfunc(model(X), y).backward()
    before = model[0].weight.diag_ggn_exact
    for _ in range(2):
        CTX.remove_hooks()
        _switch_off(model)
        extend(model)
    assert len(model[0]._forward_pre_hooks) == 1 and not model[0]._forward_hooks
    with backpack(DiagGGNExact()):
        lossfunc(model(X), y).backward()
    assert torch.equal(model[0].weight.diag_ggn_exact, before)


def test_conversion_gives_the_model_back() -> None:
    model = nn.Linear(2, 2)
    assert convert_module_to_backpack(model, debug=False) is model


def test_quantities_are_backprop_extensions() -> None:
    for name in SURFACE["backpack.extensions.firstorder"].split():
        quantity = getattr(extensions, name)()
        assert isinstance(quantity, BackpropExtension)
        assert isinstance(quantity.savefield, str)


def test_rules_of_modules_are_refused_with_a_remedy() -> None:
    with pytest.raises(NotImplementedError, match="op_rule"):
        BatchGrad().set_module_extension(nn.Linear, object())


def test_surface_is_shown() -> None:
    assert dir(library) == sorted([*library.__all__, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        library.nothing


def test_surface_is_declared() -> None:
    assert all(hasattr(library, name) for name in library.__all__)
    assert all(hasattr(extensions, name) for name in extensions.__all__)
