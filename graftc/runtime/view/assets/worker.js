// The body of the layout worker: dagre and layout.js stand before it in the same script.
const layoutCache = new Map();
self.onmessage = ({ data }) => {
  let layout = null;
  try { layout = layoutTree(data.job, globalThis.dagre, layoutCache); } catch (error) { self.postMessage({ id: data.id, failed: String(error) }); return; }
  self.postMessage({ id: data.id, layout });
};
