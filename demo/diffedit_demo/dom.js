"use strict";
// What the scripts of our components share; each component's own script follows in the same
// function, which Gradio calls with `element`, `trigger`, `props`, `upload` and `watch`.

/**
 * @param {string} tag
 * @param {Record<string, string>} attributes
 * @param {...(Node | string)} children
 */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/**
 * A line drawing on a 24 × 24 grid.
 * @param {string} path as SVG's `d`
 */
function drawing(path) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  svg.appendChild(document.createElementNS(space, "path")).setAttribute("d", path);
  return svg;
}

/**
 * The language of `texts` that the browser's user likes best; English where none is known.
 * @param {Record<string, Record<string, string>>} texts
 */
function tongue(texts) {
  const known = (navigator.languages ?? [navigator.language]).map((tag) => tag.split("-")[0].toLowerCase());
  return known.find((tag) => tag in texts) ?? "en";
}

/**
 * A function that gives texts by key, with values in their {places}.
 * @param {Record<string, Record<string, string>>} texts
 */
function speaker(texts) {
  const chosen = texts[tongue(texts)];
  return (key, places = {}) => chosen[key].replace(/\{(\w+)\}/g, (_, place) => String(places[place] ?? ""));
}

/**
 * Send a file to the server.
 * @param {File} file
 * @returns {Promise<object>} as Gradio's FileData
 */
async function sent(file) {
  const { path, url } = await upload(file);
  return {
    path, url, size: file.size, orig_name: file.name, mime_type: file.type || null, is_stream: false,
    meta: { _type: "gradio.FileData" },
  }; // prettier-ignore
}

const reasonOf = (error) => (error instanceof Error ? error.message : String(error));

/** A copy that shares nothing with what Gradio watches. */
const copied = (value) => JSON.parse(JSON.stringify(value));
