# frozen_string_literal: true

require 'yaml'

# The part of Ansible's inventory format that the guests need: hosts, groups, group_vars, host_vars, with
# Ansible's order of precedence. No ranges of hosts, no templates. A test compares it with ansible-inventory.
class Inventory
  # A host with its variables; `source` is where they were looked for.
  Host = Struct.new(:name, :vars, :source) do
    def address
      self['ansible_host']
    end

    def ports
      vars['vm_forwarded_ports'] || []
    end

    def [](key)
      vars.fetch(key) do
        abort "#{source}: the host #{name} has no #{key}, so it is no guest that Vagrant could make.\n  " \
              "Set #{key} there or in group_vars; servers that exist already need ansible-playbook only."
      end
    end
  end

  attr_reader :dir

  def initialize(dir, root)
    @dir = File.expand_path(dir, root)
    @root = root
    abort "No inventory at #{file}: TOPOLOGY is one of #{topologies.join(', ')}" unless File.exist?(file)
    # molecule/kafka/inventory is labelled kafka, ansible/inventories/single is labelled single.
    @label = File.basename(File.basename(@dir) == 'inventory' ? File.dirname(@dir) : @dir)
    @groups = Hash.new { |groups, name| groups[name] = { vars: {}, hosts: {}, children: [] } }
    load(file).each { |name, body| read_group(name, body) }
  end

  # The name of the guest for LXC, VirtualBox and libvirt.
  def guest(host)
    "clickstream-#{@label}-#{host.name}"
  end

  def test?
    @dir.start_with?("#{@root}/molecule/", "#{@root}/tests/")
  end

  def file
    File.join(@dir, 'hosts.yml')
  end

  # Later sources win: the file's variables of groups, then group_vars/all, then group_vars of other groups, then
  # the file's variables of the host, then host_vars. Groups nearer to the host come later, else by name.
  def hosts
    @groups.values.flat_map { |group| group[:hosts].keys }.uniq.map do |name|
      groups = (@groups.keys - ['all']).select { |group| member?(group, name) }
      groups = ['all', *groups.sort_by { |group| [depth(group), group] }]
      sources = groups.map { |group| @groups[group][:vars] } + groups.map { |group| files('group_vars', group) }
      sources += @groups.values.map { |group| group[:hosts][name] || {} } + [files('host_vars', name)]
      Host.new(name, sources.reduce(:merge), file)
    end
  end

  private

  def topologies
    Dir.glob("#{@root}/ansible/inventories/*/hosts.yml").map { |path| File.basename(File.dirname(path)) }.sort
  end

  def load(path)
    YAML.safe_load(File.read(path), aliases: true) || {}
  end

  def files(kind, name)
    base = File.join(@dir, kind, name)
    paths = Dir.glob("#{base}/**/*.{yml,yaml}").sort
    paths = Dir.glob("#{base}.{yml,yaml}").first(1) unless File.directory?(base)
    paths.map { |path| load(path) }.reduce({}, :merge)
  end

  def read_group(name, body)
    body ||= {}
    group = @groups[name]
    group[:vars].merge!(body['vars'] || {})
    (body['hosts'] || {}).each { |host, vars| (group[:hosts][host] ||= {}).merge!(vars || {}) }
    (body['children'] || {}).each do |child, inner|
      group[:children] |= [child]
      read_group(child, inner)
    end
  end

  # Whether a host is in a group or in a child of it, wherever in the file that is said.
  def member?(group, host)
    @groups[group][:hosts].key?(host) || @groups[group][:children].any? { |child| member?(child, host) }
  end

  # The longest way down from all.
  def depth(name)
    parents = @groups.keys.select { |group| group != 'all' && @groups[group][:children].include?(name) }
    1 + (parents.map { |parent| depth(parent) }.max || 0)
  end
end
