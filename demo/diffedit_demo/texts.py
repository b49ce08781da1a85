"""What the page says, in each of its languages. The browser's language chooses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

ENGLISH = {
    "title": "diffedit",
    "tab_edit": "Edit",
    "tab_result": "Result",
    "run": "Run",
    "cancel": "Cancel",
    "ready": "Ready.",
    "waiting": "Waiting for its turn…",
    "loading": "Loading the model {model}…",
    "preparing": "Preparing…",
    "progress": "Picture {picture} of {pictures}, pass {index} of {passes}, step {step} of {steps}",
    "left": ", about {seconds} s left",
    "cancelled": "Cancelled. Nothing was changed.",
    "done": "Done in {seconds} s.",
    "failed": "Something went wrong on the server; the log says what.",
    "seed": "Seed",
    "seed_help": "The same seed gives the same picture",
    "count": "Pictures",
    "count_help": "One for each of so many seeds",
    "model": "Model",
    "preset": "Start from",
    "presets": "Presets",
    "paint": "Replace what I paint",
    "restyle": "Restyle",
    "vary": "Vary",
    "make": "Make a new picture",
    "add_pass": "Add a pass",
    "pass": "Pass {number}",
    "on": "On",
    "up": "Move up",
    "down": "Move down",
    "copy": "Duplicate",
    "remove": "Remove",
    "more": "More settings",
    "mask_layer": "Painted mask {name}",
    "source": "The picture being edited",
    "result": "Picture {number}: {title}",
    "unset": "Not set",
    "inline": "From the workflow",
    "file": "Or a picture of your own",
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
    "code": "As",
    "before": "Before",
    "after": "After",
    "compare": "How much of the picture before is shown",
    "hold": "Hold to see the picture before",
    "difference": "Show the difference",
    "changes": "{inside} pixels changed inside the masks, {outside} outside.",
    "changes_reach": " None of those is further than {reach} px from a mask.",
    "changes_all": "{outside} pixels changed.",
    "broken": "The plugin {name} could not be loaded: {why}",
    "opened": "{name}, {width}×{height}",
    "nothing": "There is nothing to show yet.",
    "width": "Width",
    "height": "Height",
    "size_help": "Of a picture made from nothing; otherwise the picture's own",
}

CHINESE = {
    "title": "diffedit",
    "tab_edit": "编辑",
    "tab_result": "结果",
    "run": "运行",
    "cancel": "取消",
    "ready": "就绪。",
    "waiting": "正在排队……",
    "loading": "正在加载模型 {model}……",
    "preparing": "正在准备……",
    "progress": "第 {picture}/{pictures} 张,第 {index}/{passes} 遍,第 {step}/{steps} 步",
    "left": ",约剩 {seconds} 秒",
    "cancelled": "已取消,图片未改动。",
    "done": "完成,用时 {seconds} 秒。",
    "failed": "服务器出错,详情见日志。",
    "seed": "种子",
    "seed_help": "相同的种子得到相同的图片",
    "count": "张数",
    "count_help": "每个种子一张",
    "model": "模型",
    "preset": "从预设开始",
    "presets": "预设",
    "paint": "替换涂抹的部分",
    "restyle": "改变风格",
    "vary": "变化",
    "make": "生成新图片",
    "add_pass": "添加一遍",
    "pass": "第 {number} 遍",
    "on": "启用",
    "up": "上移",
    "down": "下移",
    "copy": "复制",
    "remove": "删除",
    "more": "更多设置",
    "mask_layer": "涂抹的蒙版 {name}",
    "source": "正在编辑的图片",
    "result": "图片 {number}:{title}",
    "unset": "未设置",
    "inline": "来自工作流",
    "file": "或上传图片",
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
    "code": "形式",
    "before": "之前",
    "after": "之后",
    "compare": "显示多少原图",
    "hold": "按住查看原图",
    "difference": "显示差异",
    "changes": "蒙版内改变了 {inside} 个像素,蒙版外 {outside} 个。",
    "changes_reach": "它们离蒙版都不超过 {reach} 像素。",
    "changes_all": "改变了 {outside} 个像素。",
    "broken": "插件 {name} 无法加载:{why}",
    "opened": "{name},{width}×{height}",
    "nothing": "还没有可显示的内容。",
    "width": "宽",
    "height": "高",
    "size_help": "新建图片的大小;否则与原图相同",
}

LANGUAGES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}


def say(language: str, key: str, **values: object) -> str:
    """A text in a language, with values put in."""
    return LANGUAGES.get(language, ENGLISH)[key].format(**values)


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
    return next((tag for wish, _, tag in sorted(wishes) if wish and tag in LANGUAGES), "en")
