// What one looks at is in the address, so that a link shows a colleague the same.

import { useCallback, useEffect, useState } from "preact/hooks";

const read = () => new URLSearchParams(location.hash.slice(1));

/** A word of the address, and how to change it; the default is not written. */
export function useUrl(name: string, initial: string): [string, (value: string) => void] {
  const [value, setValue] = useState(() => read().get(name) ?? initial);
  useEffect(() => {
    const follow = () => setValue(read().get(name) ?? initial);
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, [name, initial]);
  const set = useCallback(
    (next: string) => {
      const words = read();
      if (next === initial) words.delete(name);
      else words.set(name, next);
      const hash = words.toString();
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
      setValue(next);
    },
    [name, initial],
  );
  return [value, set];
}
