// The page of a unit for sharing: readers go on to the unit's full page; programs that make previews stay here.
window.location.replace(document.getElementById("full").href);
