"""Colours, fonts and the style sheet of the page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffedit_demo.texts import PAGE

_CSS = """
.run-bar { position: sticky; top: 0; z-index: 20; padding: 6px 0; gap: 6px !important;
  background: var(--body-background-fill); }
button[role="tab"][aria-selected="true"] { color: var(--body-text-color) !important; }
/* Otherwise nothing in it is sticky. */
.gradio-container { overflow: clip visible !important; }
/* Ours begin and end where Gradio's own do. */
.html-container { padding: 0 !important; }
#history .grid-container { grid-template-columns: repeat(auto-fill, 104px) !important; }
#history .thumbnail-item { height: 104px; }
.heading { display: flex; align-items: center; gap: 12px; }
.heading h1 { margin: 0; }
.heading button { width: 32px; height: 32px; border: 1px solid var(--border-color-primary);
  border-radius: 50%; color: var(--body-text-color); font-weight: 700; }
#keys { margin: auto; padding: 20px; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--background-fill-primary); color: var(--body-text-color); }
#keys::backdrop { background: rgb(0 0 0 / 40%); }
#keys caption { padding-bottom: 8px; font-weight: 700; text-align: start; }
#keys :is(th, td) { padding: 4px 12px 4px 0; text-align: start; vertical-align: top; }
#keys table:not(:lang(en)) { display: none; }
:root:lang(zh) #keys table:lang(zh) { display: table; }
:root:lang(zh) #keys table:lang(en) { display: none; }
.fault { color: var(--error-text-color); font-weight: 600; margin: 0; }
#status progress { width: 100%; accent-color: var(--color-accent); }
@media (max-width: 640px) {
  .run-bar { position: fixed; inset: auto 0 0 0; padding: 8px 12px;
    border-top: 1px solid var(--border-color-primary); }
  .run-bar .row, .row.steps { flex-wrap: nowrap; }
  .run-bar .row > *, .row.steps > * { min-width: 0 !important; }
  .gradio-container { padding-bottom: 120px !important; }
}
"""


def translations() -> gr.I18n:
    """The texts, for what the browser translates itself."""
    return gr.I18n(**{tag: dict(texts) for tag, texts in PAGE.items()})


def look() -> dict[str, Any]:
    """What `gr.mount_gradio_app` has to be told besides the page."""
    return {"css": _CSS, "i18n": translations(), "theme": theme()}


def theme() -> gr.themes.Base:
    """Gradio's own, with system fonts and text that has contrast."""
    fonts = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    made = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)
    return made.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        error_text_color="#b42318",
        error_text_color_dark="#fda29b",
    )
