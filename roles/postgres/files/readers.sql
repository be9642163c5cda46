-- Lets a reader connect to this database and read each table of its owner, present and future. The answer is whether
-- that changed anything: a grant that is there already changes no list of privileges.
CREATE FUNCTION pg_temp.privileges(owner text) RETURNS text LANGUAGE sql AS $$
  SELECT concat_ws(
    ' ',
    (SELECT datacl::text FROM pg_database WHERE datname = current_database()),
    (SELECT array_agg(defaclacl::text ORDER BY oid)::text FROM pg_default_acl WHERE defaclrole = owner::regrole),
    (SELECT array_agg(nspacl::text ORDER BY oid)::text FROM pg_namespace WHERE nspowner = owner::regrole),
    (SELECT array_agg(relacl::text ORDER BY oid)::text FROM pg_class WHERE relowner = owner::regrole)
  )
$$;

CREATE FUNCTION pg_temp.let_read(reader text, owner text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  before text := pg_temp.privileges(quote_ident(owner));
  who text := ' TO ' || quote_ident(reader);
  space name;
BEGIN
  EXECUTE 'GRANT CONNECT ON DATABASE ' || quote_ident(current_database()) || who;
  EXECUTE 'ALTER DEFAULT PRIVILEGES FOR ROLE ' || quote_ident(owner) || ' GRANT USAGE ON SCHEMAS' || who;
  EXECUTE 'ALTER DEFAULT PRIVILEGES FOR ROLE ' || quote_ident(owner) || ' GRANT SELECT ON TABLES' || who;
  FOR space IN SELECT nspname FROM pg_namespace WHERE nspowner = quote_ident(owner)::regrole LOOP
    EXECUTE 'GRANT USAGE ON SCHEMA ' || quote_ident(space) || who;
    EXECUTE 'GRANT SELECT ON ALL TABLES IN SCHEMA ' || quote_ident(space) || who;
  END LOOP;
  RETURN pg_temp.privileges(quote_ident(owner)) <> before;
END
$$;

SELECT pg_temp.let_read(%(reader)s, %(owner)s) AS changed;
