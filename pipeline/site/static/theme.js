// The theme that the reader chose, before anything is drawn: no flash of the other one. Local storage can be forbidden.
try { document.documentElement.style.colorScheme = window.localStorage.getItem("neuron-atlas.scheme") || ""; } catch { /* the theme of the system */ }
