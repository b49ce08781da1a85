"""What the page says, in each of its languages. The browser's language chooses.

Texts go by keys; the words of forms, which come from schemas in English, go by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffedit_demo.jobs import Progress

Texts = Mapping[str, Mapping[str, str]]
"""By language, then by key; {places} are filled where the text is shown."""

PAGE: Texts = {
    "en": {
        "title": "diffedit",
        "tab_edit": "Edit",
        "tab_result": "Result",
        "run": "Run",
        "cancel": "Cancel",
        "ready": "Ready.",
        "waiting": "Waiting for its turn…",
        "loading": "Loading the model {model}…",
        "preparing": "Preparing…",
        "progress": "Picture {picture} of {pictures}, pass {index} of {passes},"
        " step {step} of {steps}",
        "left": ", about {seconds} s left",
        "cancelling": "Cancelling…",
        "cancelled": "Cancelled.",
        "done": "Done in {seconds} s; {memory} of memory in use.",
        "failed": "Something went wrong on the server; the log says what.",
        "full": "Too many are waiting; try again in a moment.",
        "wrong": "Not run: {why}",
        "keep": "Keep",
        "discard": "Discard",
        "candidates": "What was made",
        "history": "Pictures",
        "undo": "Undo",
        "redo": "Redo",
        "download": "Download the picture",
        "workflow": "Workflow",
        "save": "Download the workflow",
        "load": "Open a workflow or a picture made here",
        "loaded": "The settings of the workflow are shown. Nothing was run.",
        "loaded_model": " Its model {model} is not offered here; another is set.",
        "loaded_seeds": " Its seeds do not follow each other; the first and those after it are set.",
        "code": "Copy the workflow as",
        "code_text": "The workflow",
        "changes": "{inside} pixels changed inside the masks, {outside} outside.",
        "changes_reach": " None of those is further than {reach} px from a mask.",
        "changes_all": "{outside} pixels changed.",
        "broken": "The plugin {name} could not be loaded: {why}",
        "opened": "{name}, {width}×{height}",
        "seed_title": "seed {seed}",
        "keys": "Keys",
        "about": "About the model: licence and limits",
    },
    "zh": {
        "title": "diffedit",
        "tab_edit": "编辑",
        "tab_result": "结果",
        "run": "运行",
        "cancel": "取消",
        "ready": "就绪。",
        "waiting": "正在排队……",
        "loading": "正在加载模型 {model}……",
        "preparing": "正在准备……",
        "progress": "第 {picture}/{pictures} 张，第 {index}/{passes} 遍，第 {step}/{steps} 步",
        "left": ",约剩 {seconds} 秒",
        "cancelling": "正在取消……",
        "cancelled": "已取消。",
        "done": "完成，用时 {seconds} 秒；占用内存 {memory}。",
        "failed": "服务器出错，详情见日志。",
        "full": "排队人数过多，请稍后再试。",
        "wrong": "未运行：{why}",
        "keep": "采用",
        "discard": "放弃",
        "candidates": "生成的图片",
        "history": "图片历史",
        "undo": "撤销",
        "redo": "重做",
        "download": "下载图片",
        "workflow": "工作流",
        "save": "下载工作流",
        "load": "打开工作流或本工具生成的图片",
        "loaded": "已显示工作流的设置，尚未运行。",
        "loaded_model": "此处没有它的模型 {model}，已改用其他模型。",
        "loaded_seeds": "它的种子不连续，已改为从第一个开始的连续种子。",
        "code": "复制工作流为",
        "code_text": "工作流内容",
        "changes": "蒙版内改变了 {inside} 个像素，蒙版外 {outside} 个。",
        "changes_reach": "它们离蒙版都不超过 {reach} 像素。",
        "changes_all": "改变了 {outside} 个像素。",
        "broken": "插件 {name} 无法加载：{why}",
        "opened": "{name},{width}×{height}",
        "seed_title": "种子 {seed}",
        "keys": "快捷键",
        "about": "关于模型：许可与限制",
    },
}

VIEWER: Texts = {
    "en": {
        "before": "Before",
        "after": "After",
        "compare": "How much of the picture before is shown",
        "hold": "Hold to see the picture before",
        "difference": "Show the difference",
        "nothing": "There is nothing to show yet.",
    },
    "zh": {
        "before": "之前",
        "after": "之后",
        "compare": "显示多少原图",
        "hold": "按住查看原图",
        "difference": "显示差异",
        "nothing": "还没有可显示的内容。",
    },
}

COMPOSER: Texts = {
    "en": {
        "preset": "Start from…",
        "preset_paint": "Replace what I paint",
        "preset_restyle": "Restyle",
        "preset_vary": "Vary",
        "preset_make": "Make a new picture",
        "takeBack": "Take the last change of the stack back",
        "settings": "Settings of the run",
        "addPass": "Add a pass",
        "addEdit": "Add an edit",
        "pass": "Pass {number}",
        "on": "{name}",
        "up": "Move {name} up",
        "down": "Move {name} down",
        "copy": "Duplicate {name}",
        "remove": "Remove {name}",
        "more": "More settings",
        "reset": "Set {name} back",
        "random": "Draw a {name} at random",
        "unset": "Not set",
        "choose": "Choose a picture…",
        "layer": "Painted mask {name}",
        "source": "The picture being edited",
        "result": "Picture {number}: {title}",
        "inline": "From the workflow",
        "file": "A file…",
        "uploadFailed": "{name} could not be sent: {reason}",
        "hint": "Show the hint",
        "making": "Making the hint…",
        "between": "Should be {low} to {high}.",
        "atLeast": "Should be {low} or more.",
        "atMost": "Should be {high} or less.",
        "missing": "The edit {name} is not installed here.",
    },
    "zh": {
        "preset": "从预设开始……",
        "preset_paint": "替换涂抹的部分",
        "preset_restyle": "改变风格",
        "preset_vary": "变化",
        "preset_make": "生成新图片",
        "takeBack": "撤销上一次结构更改",
        "settings": "运行设置",
        "addPass": "添加一遍处理",
        "addEdit": "添加编辑",
        "pass": "第 {number} 遍",
        "on": "启用 {name}",
        "up": "上移 {name}",
        "down": "下移 {name}",
        "copy": "复制 {name}",
        "remove": "删除 {name}",
        "more": "更多设置",
        "reset": "重置{name}",
        "random": "随机选择{name}",
        "unset": "未设置",
        "choose": "请选择图片……",
        "layer": "涂抹的蒙版 {name}",
        "source": "正在编辑的图片",
        "result": "图片 {number}：{title}",
        "inline": "来自工作流",
        "file": "选择文件……",
        "uploadFailed": "{name} 无法上传：{reason}",
        "hint": "显示引导图",
        "making": "正在生成引导图……",
        "between": "应在 {low} 到 {high} 之间。",
        "atLeast": "不能小于 {low}。",
        "atMost": "不能大于 {high}。",
        "missing": "此处未安装编辑 {name}。",
    },
}

CANVAS: Texts = {
    "en": {
        "tools": "Mask tools",
        "open": "Open a picture",
        "brush": "Brush",
        "eraser": "Eraser",
        "rectangle": "Rectangle",
        "lasso": "Lasso",
        "fill": "Fill all",
        "invert": "Invert the mask",
        "clear": "Clear the mask",
        "maskFile": "Mask from a file",
        "undo": "Undo",
        "redo": "Redo",
        "size": "Brush size",
        "pixels": "{size} pixels",
        "layer": "Mask {layer}",
        "layerPainted": "Mask {layer}, painted",
        "zoom": "Zoom",
        "zoomIn": "Zoom in",
        "zoomOut": "Zoom out",
        "zoomed": "{percent} %",
        "fit": "Fit",
        "invite": "Open, drop or paste a picture",
        "empty": "No picture yet",
        "surface": "{name}, {width} × {height} pixels, {share} % masked in mask {layer}",
        "crosshair": "{x}, {y}",
        "corner": "First corner at {x}, {y}",
        "sending": "Opening {name}",
        "notPicture": "{name} is not a picture that can be opened",
        "notShown": "{name} could not be shown",
        "uploadFailed": "{name} could not be sent: {reason}",
        "masksFailed": "The mask could not be sent: {reason}",
    },
    "zh": {
        "tools": "蒙版工具",
        "open": "打开图片",
        "brush": "画笔",
        "eraser": "橡皮",
        "rectangle": "矩形",
        "lasso": "套索",
        "fill": "全部填充",
        "invert": "反转蒙版",
        "clear": "清除蒙版",
        "maskFile": "从文件读取蒙版",
        "undo": "撤销",
        "redo": "重做",
        "size": "画笔大小",
        "pixels": "{size} 像素",
        "layer": "蒙版 {layer}",
        "layerPainted": "蒙版 {layer}，已涂抹",
        "zoom": "缩放",
        "zoomIn": "放大",
        "zoomOut": "缩小",
        "zoomed": "百分之 {percent}",
        "fit": "适合窗口",
        "invite": "打开、拖入或粘贴图片",
        "empty": "还没有图片",
        "surface": "{name}，{width} × {height} 像素，蒙版 {layer} 覆盖 {share} %",
        "crosshair": "坐标 {x}， {y}",
        "corner": "第一个角在 {x}， {y}",
        "sending": "正在打开 {name}",
        "notPicture": "{name} 不是可以打开的图片",
        "notShown": "{name} 无法显示",
        "uploadFailed": "{name} 无法上传：{reason}",
        "masksFailed": "蒙版无法上传：{reason}",
    },
}

KEYS: Texts = {
    "en": {
        "Ctrl+Enter": "Run",
        "Ctrl+.": "Cancel the run",
        "B, E, R, L": "Brush, eraser, rectangle, lasso",
        "[ , ]": "Smaller and larger brush",
        "I": "Invert the mask",
        "Ctrl+Z, Ctrl+Shift+Z": "Undo and redo strokes",
        "Ctrl+V": "Open the picture in the clipboard",
        "+, −, 0": "Zoom in, out, fit",
        "Space": "Hold and drag: move the picture",
        "← ↑ → ↓, Enter": "On the picture: a rectangle without a mouse",
        "Alt+↑, Alt+↓": "On a pass or edit: move it",
    },
    "zh": {
        "Ctrl+Enter": "运行",
        "Ctrl+.": "取消运行",
        "B, E, R, L": "画笔、橡皮、矩形、套索",
        "[ , ]": "缩小、放大画笔",
        "I": "反转蒙版",
        "Ctrl+Z, Ctrl+Shift+Z": "撤销、重做笔画",
        "Ctrl+V": "打开剪贴板中的图片",
        "+, −, 0": "放大、缩小、适合窗口",
        "Space": "按住并拖动：移动图片",
        "← ↑ → ↓, Enter": "在图片上：不用鼠标画矩形",
        "Alt+↑, Alt+↓": "在一遍或编辑上：移动它",
    },
}

WORDS: Texts = {
    "zh": {
        # Titles
        "Prompt": "提示词",
        "Negative": "反向提示词",
        "Steps": "步数",
        "Guidance": "引导强度",
        "Rescale": "对比度保持",
        "Scheduler": "采样器",
        "Seed": "种子",
        "Pictures": "张数",
        "Model": "模型",
        "Width": "宽",
        "Height": "高",
        "Id": "名称",
        "After": "排在其后",
        "Mask": "蒙版",
        "Feather": "羽化",
        "Margin": "边距",
        "Strength": "强度",
        "Image": "图片",
        "Start": "开始",
        "End": "结束",
        "Kind": "种类",
        "Weight": "权重",
        "Weights": "权重文件",
        # What they do
        "What the picture is to show": "图片要显示的内容",
        "What it is not to show": "图片不要显示的内容",
        "Sampling steps, before a strength cuts them": "采样步数(强度会减少它)",
        "Guidance scale; 1 or less leaves the negative prompt out": "引导强度；不大于 1 时忽略反向提示词",
        "How far guidance keeps the unguided prediction's contrast": "引导时在多大程度上保持原有对比度",
        "Name of the sampler; empty: the model's own": "采样器名称；留空则用模型自带的",
        "The same seed gives the same picture": "相同的种子得到相同的图片",
        "One for each of so many seeds": "每个种子一张",
        "What paints; its licence and limits are in its card": "用来作画的模型；许可和限制见其说明",
        "Of a picture made from nothing; otherwise the picture's own": "新建图片的大小；否则与原图相同",
        "A name for this edit within its pass": "此编辑在本遍中的名称",
        "The id of an edit of the same pass that acts before this one": "本遍中先于此编辑的编辑名称",
        "White where the picture is to change; greys change later": "白色处将被改变；灰色处较晚改变",
        "Pixels outside the mask over which the edit fades; 0 touches none of them": "编辑在蒙版外渐隐的像素数;0 表示完全不触及",
        "Pixels around the mask that the model sees as context": "模型在蒙版周围看到的像素数",
        "How far from the source: the fraction of the steps that is run": "离原图多远：执行步数的比例",
        "The reference whose look is taken": "取其风格的参考图片",
        "How much of the look is taken; 0 takes nothing, above 1 favours the reference": "取多少风格;0 为不取，大于 1 偏向参考图片",
        "What the reference shows; describing it keeps its things out of the picture": "参考图片的内容；写明后其中的物体不会进入图片",
        "From which fraction of the steps on": "从步数的哪个比例开始",
        "Up to which fraction of the steps": "到步数的哪个比例为止",
        "Folder or hub id of the control network; none: the loaded model's own": "控制网络的文件夹或编号；留空则用模型自带的",
        'How the hint is made from the image: a preprocessor\'s name, or "none" if the image is a hint already': "如何由图片生成引导图：预处理器名称；若图片已是引导图则为 none",
        "What to take the hint from; none: the picture being edited": "引导图的来源；留空则为正在编辑的图片",
        "How strongly it acts": "作用强度",
        "Folder or hub id of the preprocessor's weights; none: its usual ones": "预处理器权重的文件夹或编号；留空则用默认的",
    },
}  # fmt: skip


def say(language: str, key: str, **values: object) -> str:
    """A text of the page in a language, with values put in."""
    return PAGE.get(language, PAGE["en"])[key].format(**values)


def progress(tongue: str, one: Progress) -> str:
    """How far a run is."""
    said = say(
        tongue, "progress", picture=one.picture + 1, pictures=one.pictures,
        index=one.pass_index + 1, passes=one.passes, step=one.step, steps=one.steps,
    )  # fmt: skip
    if one.seconds_left is not None and one.seconds_left >= 1:
        said += say(tongue, "left", seconds=round(one.seconds_left))
    return said


@lru_cache(256)  # what a stranger may fill with headers
def language(accepted: str) -> str:
    """The language that an Accept-Language header (RFC 9110, 12.5.4) likes best of those known."""
    wishes = []
    for place, said in enumerate(accepted.split(",")):
        tag, _, quality = said.strip().partition(";q=")
        try:
            wishes.append((-float(quality or 1), place, tag.split("-")[0].lower()))
        except ValueError:
            continue
    return next((tag for wish, _, tag in sorted(wishes) if wish and tag in PAGE), "en")
